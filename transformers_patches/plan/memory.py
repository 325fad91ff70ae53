"""How a bound on the memory of the whole process is kept: what lies in memory, and which share of the neurons does.

The process needs the runtime (Python, PyTorch, transformers), the weights that every token reads, a key-value cache,
what computing takes, and room for one layer's neurons, into which those on disk are read. What is left is for neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers_patches.errors import PartInferError

LATER = 40 * 10**6  # bytes that the runtime takes after loading: threads, buffers of libraries, modules imported late
PER_TOKEN = 12  # bytes for each neuron of a layer and token of a prompt: activations, their copies, scores
PROMPT_TOKENS = 256  # of a prompt, that are computed at once
MB = 10**6


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a process needs.

    runtime: before weights are loaded, and LATER.
    fixed: weights that are in memory whatever is decided.
    neurons: rows of gate and down of all layers that can be read on demand.
    scratch: room for one layer's.
    cache: keys and values.
    computing: activations of a prompt.
    """

    runtime: int
    fixed: int
    neurons: int
    scratch: int
    cache: int
    computing: int

    @property
    def least(self) -> int:
        """With no neuron in memory."""
        return self.runtime + self.fixed + self.cache + self.computing + (self.scratch if self.neurons else 0)

    @property
    def most(self) -> int:
        """With all neurons in memory."""
        return self.runtime + self.fixed + self.cache + self.computing + self.neurons

    def resident(self, limit: int) -> float:
        """The share of the neurons that a bound has room for; 1: nothing is read on demand.

        Raises PartInferError, which says how much would do, if the rest does not fit.
        """
        if self.most <= limit:
            return 1.0
        if self.least > limit:
            raise PartInferError(
                f"--memory {limit / MB:.0f}M is not enough: at least {-(-self.least // MB)}M would do ({self.in_words()})"
            )
        return max(0.0, int(1000 * (limit - self.least) / self.neurons) / 1000)

    def in_words(self) -> str:
        """What takes how much."""
        parts = {
            "runtime": self.runtime,
            "weights that every token reads": self.fixed,
            "key-value cache": self.cache,
            "computing": self.computing,
            "one layer's neurons": self.scratch,
        }
        return ", ".join(f"{name} {size / MB:.0f}" for name, size in parts.items() if size) + " MB"
