"""Kernels that choose positions by their scores, without the processor having to know how many. T tokens, n positions.

Scores are float32 and not negative, so that their bits, as integers, have the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pivots_kernel(scores, count, keep, pivots, BLOCK: tl.constexpr):
    """pivots[t] = the bits of token t's `keep`-th largest score, and how many scores equal to it are to be kept.

    scores: [T, count].
    pivots: int32 [T, 2].
    BLOCK: at least count.

    The largest number that is not above `keep` of the scores is found bit by bit. Grid (T).
    """
    token = tl.program_id(0)
    own = tl.arange(0, BLOCK)
    bits = tl.load(scores + token.to(tl.int64) * count + own, mask=own < count, other=0).to(tl.int32, bitcast=True)
    pivot = token * 0
    for step in range(31):
        candidate = pivot + (1 << (30 - step))
        enough = tl.sum((bits >= candidate).to(tl.int32)) >= keep
        pivot = tl.where(enough, candidate, pivot)
    tl.store(pivots + 2 * token, pivot)
    tl.store(pivots + 2 * token + 1, keep - tl.sum((bits > pivot).to(tl.int32)))


@triton.jit
def choose_kernel(scores, count, pivots, pivot_stride, chosen, counts, BLOCK: tl.constexpr):
    """chosen[t, :counts[t]] = the positions of scores above the token's pivot, and of the first ones equal to it.

    scores: [T, count]. Scores of 0 are never kept.
    pivots: int32 [T, 2] as `pivots_kernel` has them, pivot_stride numbers apart (0: the same for all tokens).
    chosen: int32 [T, count], in ascending order.
    counts: int32 [T].

    Every program counts again what the segments before its own keep, instead of waiting for them. Grid (segments, T).
    """
    segment, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = scores + token * count
    pivot = tl.load(pivots + token * pivot_stride)
    ties = tl.load(pivots + token * pivot_stride + 1)
    own = tl.arange(0, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, segment * BLOCK, BLOCK):
        bits = tl.load(row + start + own).to(tl.int32, bitcast=True)
        above += (bits > pivot).to(tl.int32)
        equal += ((bits == pivot) & (bits > 0)).to(tl.int32)
    equal_before = tl.sum(equal)
    before = tl.sum(above) + tl.minimum(equal_before, ties)
    place = segment * BLOCK + own
    bits = tl.load(row + place, mask=place < count, other=0).to(tl.int32, bitcast=True)
    same = (bits == pivot) & (bits > 0)
    rank = equal_before + tl.cumsum(same.to(tl.int32))
    kept = (bits > pivot) | (same & (rank <= ties))
    slots = before + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(chosen + token * count + slots, place, mask=kept)
    if segment == tl.num_programs(0) - 1:
        tl.store(counts + token, before + tl.sum(kept.to(tl.int32)))


@triton.jit
def inputs_kernel(x, mean, norm, count, apart, scores, BLOCK: tl.constexpr):
    """apart = x - mean, scores = |apart| norm: float32 [T, count] each, from x [T, count]. Grid (blocks, T)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row = tl.program_id(1).to(tl.int64) * count
    value = tl.load(x + row + place, mask=inside, other=0).to(tl.float32) - tl.load(mean + place, mask=inside, other=0)
    tl.store(apart + row + place, value, mask=inside)
    tl.store(scores + row + place, tl.abs(value) * tl.load(norm + place, mask=inside, other=0), mask=inside)
