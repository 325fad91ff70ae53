"""Compiles the kernels for GPUs that need not be there, up to machine code. A process of its own, without the interpreter.

Prints one line for each GPU: how many kernels were compiled for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[4]))

from tests.transformers_patches.kernels.helpers import active, quantized_ffn, weights  # noqa: E402
from transformers_patches.kernels import ByInput  # noqa: E402
from transformers_patches.kernels.triton import launch, operations  # noqa: E402


class _Driver:
    """What Triton asks about the GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_everything(kind: torch.dtype | int) -> None:
    """Every operation once, with weights of a float type or of so many bits."""
    floats = weights(3, 64, 512)
    parts = quantized_ffn(floats, kind) if isinstance(kind, int) else [weight.to(kind) for weight in floats]
    x, size, index = torch.randn(1, 512).bfloat16(), torch.rand(64), torch.arange(20, 40).int()
    operations.ffn_on_device(x, active(parts, 20, index))
    operations.ffn_on_device(x, active(parts, 20, index, size=size, keep_count=9))
    operations.ffn_on_device(x, active(parts, 20, index, size=size, threshold=0.1, down_size=size, down_threshold=0.1))
    operations.ffn_on_device(x, active([parts[0], parts[2]], 64, activation="gelu", size=size, keep_count=9))
    operations.linear(x, parts[0], torch.rand(64))
    operations.by_input_on_device(x[:, :64].contiguous(), ByInput(parts[2], size, size, torch.rand(512), 0.1))


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        driver.set_active(_Driver(capability))
        compiled = set()

        def start(kernel, grid, *arguments, compiled=compiled, **constants):
            result = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **constants)
            compiled.add((result.hash, len(result.asm["cubin"]) > 0))

        launch.start = start
        for kind in (torch.bfloat16, torch.float16, 8, 4):
            run_everything(kind)
        launch.choose(torch.rand(1, launch.MOST_SCORES), 9, None)  # the largest block
        assert all(has_code for _, has_code in compiled)
        print(f"sm_{capability}: {len(compiled)} kernels")
