"""Kernels that multiply rows with tokens, and that sum rows up. T tokens, n positions, H columns."""

from __future__ import annotations

import triton
import triton.language as tl

from transformers_patches.kernels.triton.device import activated, positions_of, row_products


@triton.jit
def products_kernel(
    x,
    weights,
    positions,
    finish,
    out,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[t, position] = act(row·x_t + bias) for the token's positions; `finish` says what more becomes of it.

    weights: one, or gate and up, whose products are multiplied.
    out: [T, n]. What is not among a chosen token's positions is not written.
    BLOCKS: rows of a program, and columns that it reads at once.

    A program takes a few rows of one token; grid (slots, T). Programs without a slot end at once, so that a grid for all
    positions does for any number of chosen ones.
    """
    token = tl.program_id(1)
    if positions.chosen is not None:  # noqa: SIM102 - the inner one is not compiled where the outer one is not met
        if tl.program_id(0) * BLOCKS[0] >= tl.load(positions.counts + token):
            return
    slots = tl.program_id(0) * BLOCKS[0] + tl.arange(0, BLOCKS[0])
    place, rows, there = positions_of(slots, token, positions)
    vector = x + token.to(tl.int64) * weights[0].columns
    value = activated(row_products(vector, weights[0], rows, there, BITS, BLOCKS[1]), ACTIVATION)
    if len(weights) == 2:
        value *= row_products(vector, weights[1], rows, there, BITS, BLOCKS[1])
    own = token.to(tl.int64) * positions.count + place
    if finish.times is not None:
        value *= tl.load(finish.times + own, mask=there, other=0)
    if finish.down_size is not None:
        kept = tl.abs(value) * tl.load(finish.down_size + rows, mask=there, other=0) > finish.down_threshold
        value = tl.where(kept, value, 0)
    if finish.scores is not None:
        size = tl.load(finish.size + rows, mask=there, other=0)
        tl.store(finish.scores + own, tl.abs(value) * size, mask=there)
    tl.store(out + own, value, mask=there)


@triton.jit
def sums_kernel(factors, weight, positions, partial, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """partial[t, part] = the sum over a part of the token's positions of factor times row: float32 [T, parts, H].

    factors: [T, n], by position. Rows whose factor is 0 are not read.
    BLOCKS: rows and columns that a program reads at once.

    Grid (column blocks, parts, T). The parts' order is fixed, so that sums are the same every time.
    """
    token = tl.program_id(2)
    count = positions.count
    if positions.chosen is not None:
        count = tl.load(positions.counts + token)
    out = partial + (token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * weight.columns
    if BITS == 0:
        _float_sums(factors, weight, positions, count, out, BLOCKS)
    else:
        _group_sums(factors, weight, positions, count, out, BITS, BLOCKS)


@triton.jit
def _factors(factors, start, token, positions, ROWS: tl.constexpr):
    place, rows, there = positions_of(start + tl.arange(0, ROWS), token, positions)
    values = tl.load(factors + token.to(tl.int64) * positions.count + place, mask=there, other=0).to(tl.float32)
    return values, rows, there & (values != 0)


@triton.jit
def _float_sums(factors, weight, positions, count, out, BLOCKS: tl.constexpr):
    columns = tl.program_id(0) * BLOCKS[1] + tl.arange(0, BLOCKS[1])
    inside = columns < weight.columns
    total = tl.zeros([BLOCKS[0], BLOCKS[1]], tl.float32)
    for start in range(tl.program_id(1) * BLOCKS[0], count, tl.num_programs(1) * BLOCKS[0]):
        values, rows, read = _factors(factors, start, tl.program_id(2), positions, BLOCKS[0])
        place = weight.data + rows[:, None] * weight.row_stride + columns[None, :]
        total += values[:, None] * tl.load(place, mask=read[:, None] & inside[None, :], other=0).to(tl.float32)
    tl.store(out + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _group_sums(factors, weight, positions, count, out, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    GROUPS: tl.constexpr = BLOCKS[1] // 32
    BYTES: tl.constexpr = 4 * BITS  # of a group
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = groups < weight.columns // 32
    inner = tl.arange(0, BYTES)
    first = tl.zeros([BLOCKS[0], GROUPS, BYTES], tl.float32)
    second = tl.zeros([BLOCKS[0], GROUPS, BYTES], tl.float32)  # of the high four bits
    for start in range(tl.program_id(1) * BLOCKS[0], count, tl.num_programs(1) * BLOCKS[0]):
        values, rows, read = _factors(factors, start, tl.program_id(2), positions, BLOCKS[0])
        mask = read[:, None] & inside[None, :]
        scales = tl.load(weight.scales + rows[:, None] * weight.scale_stride + groups[None, :], mask=mask, other=0)
        scaled = (values[:, None] * scales.to(tl.float32))[:, :, None]
        place = (rows[:, None] * weight.row_stride + groups[None, :] * BYTES)[:, :, None] + inner[None, None, :]
        packed = tl.load(weight.data + place, mask=mask[:, :, None], other=0)
        if BITS == 8:
            first += scaled * packed.to(tl.float32)
        else:
            first += scaled * ((packed & 15).to(tl.float32) - 8)
            second += scaled * ((packed >> 4).to(tl.float32) - 8)
    own = out + groups[:, None] * 32 + inner[None, :]
    tl.store(own, tl.sum(first, axis=0), mask=inside[:, None])
    if BITS == 4:
        tl.store(own + 16, tl.sum(second, axis=0), mask=inside[:, None])


@triton.jit
def finish_sums_kernel(partial, parts, columns, column_scales, constant, out, BLOCK: tl.constexpr):
    """out[t] = the sum of the parts [T, parts, H], times column_scales [H], plus constant [H]. Grid (column blocks, T)."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = own < columns
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(partial + (token * parts + part) * columns + own, mask=inside, other=0)
    if column_scales is not None:
        total *= tl.load(column_scales + own, mask=inside, other=0)
    if constant is not None:
        total += tl.load(constant + own, mask=inside, other=0)
    tl.store(out + token * columns + own, total, mask=inside)
