"""The types of llama.cpp's weights that --compare takes.

No heavy imports: flags are checked with it, and what a process of llama.cpp imports counts as its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_patches.errors import PartInferError

# llama.cpp's number of each (`llama_ftype` in llama.h), in order of their bits. Types that need an importance matrix are
# left out: none is made.
QUANTIZED = {
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q4_k_m": 15,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_xs": 30,
    "q3_k_m": 12,
    "iq3_s": 26,
    "q2_k": 10,
}
SAME_BITS = {"int8": "q8_0", "int4": "q4_0"}  # llama.cpp's types with as many bits as ours
PROGRAM = "llama.cpp"
HELP = (
    f"{PROGRAM} with the model's own type of weights, or with those of its quantiser, such as "
    f"{PROGRAM}:q4_k_m,iq4_xs,q4_0 ({', '.join(QUANTIZED)})"
)


@dataclass(frozen=True)
class ComparedFile:
    """A file that llama.cpp reads."""

    path: Path
    kind: str  # a float type as PyTorch names it, or a key of QUANTIZED
    note: str  # where its weights come from
    token_bytes: int  # what one token reads of it: all but the embedding table, unless that is the lm_head, too

    @property
    def label(self) -> str:
        return f"llama.cpp {self.kind}"


def parse_compared(text: str) -> list[str | None]:
    """The types of a --compare list: None for the model's own.

    A name without a program belongs to the program before it. Raises PartInferError for what is not known.
    """
    kinds: list[str | None] = []
    program = ""
    for given in filter(None, (part.strip() for part in text.split(","))):
        if given.partition(":")[0] == PROGRAM:
            program, _, kind = given.partition(":")
        else:
            kind = given if program else "?"
        if kind and kind not in QUANTIZED:
            raise PartInferError(f"--compare takes {PROGRAM} and {PROGRAM}:{','.join(QUANTIZED)}, got {given!r}")
        if (kind or None) not in kinds:
            kinds.append(kind or None)
    return kinds
