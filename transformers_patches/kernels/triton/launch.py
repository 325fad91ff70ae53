"""How kernels are started: the sizes of their blocks and grids. T tokens, n positions, H columns.

The sizes are chosen so that a matrix of a 1B model already makes some programs for each of a GPU's multiprocessors
(an H200 has 132), and that a program has several kilobytes of loads under way. They have not been tuned on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from transformers_patches.kernels.triton import choice_kernels, row_kernels
from transformers_patches.kernels.triton.arguments import Finish, Matrix, Positions

SLOTS = 4  # rows of a program that multiplies
SUMMED_ROWS = 8  # rows of a program that sums up, at a time
SUMMED_COLUMNS = 128
MOST_PARTS = 32  # of a sum
SEGMENT = 1024  # scores of a program that chooses
MOST_SCORES = 65536  # of which `pivots` finds the k-th largest
BITS = {torch.int8: 8, torch.uint8: 4}  # of packed values; 0 for floats


def start(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Start a kernel over a grid, on the GPU of its first argument, a tensor; nothing if the grid is empty."""
    if not all(grid):
        return
    first = arguments[0]
    # Triton starts kernels on the current GPU, which need not be the one that the tensors are on
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def bits_of(matrix: Matrix) -> int:
    """The argument BITS for a weight."""
    return BITS.get(matrix.data.dtype, 0)


def products(
    x: Tensor, weights: list[Matrix], positions: Positions, finish: Finish, activation: str | None, out: Tensor
) -> None:
    """`products_kernel` for x [T, H]."""
    block = 512 if weights[0].columns >= 512 else max(32, triton.next_power_of_2(weights[0].columns))
    start(
        row_kernels.products_kernel,
        (triton.cdiv(positions.count, SLOTS), len(x)),
        x,
        tuple(weights),
        positions,
        finish,
        out,
        ACTIVATION=activation,
        BITS=bits_of(weights[0]),
        BLOCKS=(SLOTS, block),
    )


def sums(factors: Tensor, weight: Matrix, positions: Positions, added: tuple, out: Tensor) -> None:
    """out [T, H] = the sums of factors [T, n] times rows. added: column scales and a constant, float32 [H], or None."""
    tokens, columns = out.shape
    parts = max(1, min(MOST_PARTS, triton.cdiv(positions.count, 4 * SUMMED_ROWS)))
    blocks = triton.cdiv(columns, SUMMED_COLUMNS)
    partial = torch.empty(tokens, parts, columns, dtype=torch.float32, device=out.device)
    start(
        row_kernels.sums_kernel,
        (blocks, parts, tokens),
        factors,
        weight,
        positions,
        partial,
        BITS=bits_of(weight),
        BLOCKS=(SUMMED_ROWS, SUMMED_COLUMNS),
    )
    start(
        row_kernels.finish_sums_kernel,
        (blocks, tokens),
        partial,
        parts,
        columns,
        *added,
        out,
        BLOCK=SUMMED_COLUMNS,
    )


def choose(scores: Tensor, keep: int | None, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """The positions of the `keep` largest scores [T, n], or of those above a threshold: chosen [T, n] and counts [T].

    threshold: float32 [1] on the scores' device, instead of keep.
    """
    tokens, count = scores.shape
    chosen = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=scores.device)
    if count == 0:
        return chosen, counts.zero_()
    if keep is None:
        pivots = torch.zeros(1, 2, dtype=torch.int32, device=scores.device)
        pivots[:, 0] = threshold.clamp(min=0).view(torch.int32)
    else:
        pivots = torch.empty(tokens, 2, dtype=torch.int32, device=scores.device)
        block = triton.next_power_of_2(count)
        start(choice_kernels.pivots_kernel, (tokens,), scores, count, keep, pivots, BLOCK=block, num_warps=16)
    stride = 0 if keep is None else 2
    grid = (triton.cdiv(count, SEGMENT), tokens)
    start(choice_kernels.choose_kernel, grid, scores, count, pivots, stride, chosen, counts, BLOCK=SEGMENT)
    return chosen, counts


def inputs(x: Tensor, mean: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, n] minus mean, and |that| times norm: float32 [T, n] each."""
    apart = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    scores = torch.empty_like(apart)
    grid = (triton.cdiv(x.shape[1], SEGMENT), len(x))
    start(choice_kernels.inputs_kernel, grid, x, mean, norm, x.shape[1], apart, scores, BLOCK=SEGMENT)
    return apart, scores
