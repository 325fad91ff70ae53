"""Tokenizers of GGUF files that were built before, kept in the cache folder.

Building one takes a second for 150,000 tokens; reading what was built takes a third of that. An entry belongs to a file
(its path, size and time of writing) and to the code that built it. What is damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from transformers_patches.files import cache_folder, write_text_atomic
from transformers_patches.weights.file_state import FileState
from transformers_patches.weights.gguf_vocabulary import Vocabulary

MOST_KEPT = 8
BUILDERS = ("gguf_tokenizer.py", "gguf_vocabulary.py", "gguf_pre_tokenizers.py", "gguf_schema.py", "gguf_file.py")


@dataclass(frozen=True)
class TokenFacts:
    """What is known of a vocabulary beside its tokenizer."""

    count: int  # tokens
    bos: int | None  # id of the token that begins a text
    pad: int | None  # id of the token that fills up
    ends: list[int]  # ids of the tokens that end an answer
    special: dict[str, str]  # texts of bos_token, eos_token and so on

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TokenFacts:
        named = vocabulary.named
        special = {
            f"{name}_token": vocabulary.tokens[named[name]] for name in ("bos", "eos", "unk", "pad") if name in named
        }
        return cls(len(vocabulary.tokens), vocabulary.bos, named.get("pad"), vocabulary.ends, special)


class Kept:
    """What is kept of one GGUF file's tokenizer: its facts, and the tokenizer itself in a file of its own."""

    def __init__(self, path: Path) -> None:
        place = Path(path).absolute()
        self._of_path = _hash(os.fsencode(place))[:16]
        try:
            state = FileState.of(place)
        except OSError:
            state = None
        key = _hash(repr((state, _builders())).encode())[:16]
        folder = cache_folder("tokenizers")
        self._facts = folder / f"{self._of_path}-{key}.facts"
        self._tokenizer = folder / f"{self._of_path}-{key}.tokenizer.json"

    def facts(self) -> TokenFacts | None:
        """The facts, or None if they are not kept, or damaged."""
        found = self._read()
        return None if found is None else found[0]

    def tokenizer(self) -> tuple[TokenFacts, Path] | None:
        """The facts and the tokenizer's file, or None if they are not kept, or damaged."""
        found = self._read()
        with suppress(OSError):
            if found is not None and _hash(self._tokenizer.read_bytes()) == found[1]:
                return found[0], self._tokenizer
        return None

    def _read(self) -> tuple[TokenFacts, str] | None:
        """The facts, and the hash that the tokenizer's file must have."""
        try:
            seal, _, content = self._facts.read_text(encoding="utf-8").partition("\n")
            if seal != _hash(content.encode()):
                return None
            facts, tokenizer_hash = json.loads(content)
            return TokenFacts(**facts), tokenizer_hash
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, facts: TokenFacts, tokenizer: Tokenizer) -> None:
        """Write both, in the place of what was kept of an earlier file at this path. Does nothing where that can't be."""
        text = tokenizer.to_str()
        content = json.dumps([asdict(facts), _hash(text.encode())])
        with suppress(OSError):
            write_text_atomic(self._tokenizer, text)
            write_text_atomic(self._facts, f"{_hash(content.encode())}\n{content}")
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove other entries of this path, and all but the newest ones."""
        entries = sorted(self._facts.parent.glob("*.facts"), key=lambda entry: -entry.stat().st_mtime_ns)
        for number, entry in enumerate(entries):
            if entry != self._facts and (number >= MOST_KEPT or entry.name.startswith(self._of_path)):
                entry.unlink(missing_ok=True)
                entry.with_name(entry.name.replace(".facts", ".tokenizer.json")).unlink(missing_ok=True)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def _builders() -> str:
    """A hash that changes with the code that builds tokenizers."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for name in BUILDERS:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
