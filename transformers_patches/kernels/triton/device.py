"""What the kernels are made of: where positions lie, products of rows with a token, activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions_of(slots, token, positions):
    """Positions and storage rows of a token's slots, and which of the slots there are: [n] each."""
    if positions.chosen is not None:
        there = slots < tl.load(positions.counts + token)
        place = tl.load(positions.chosen + token * positions.count + slots, mask=there, other=0)
    else:
        there = slots < positions.count
        place = slots
    rows = place
    if positions.index is not None:
        listed = place >= positions.prefix
        rows = tl.where(
            listed, tl.load(positions.index + place - positions.prefix, mask=there & listed, other=0), place
        )
    return place, rows.to(tl.int64), there


@triton.jit
def row_products(x, weight, rows, there, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [n]: the products of rows [n] of a weight with one token x [columns]. BITS: 0 for floats."""
    if BITS == 0:
        result = _float_products(x, weight, rows, there, BLOCK)
    else:
        result = _group_products(x, weight, rows, there, BITS, BLOCK)
    if weight.bias is not None:
        result += tl.load(weight.bias + rows, mask=there, other=0).to(tl.float32)
    return result


@triton.jit
def _float_products(x, weight, rows, there, BLOCK: tl.constexpr):
    total = tl.zeros([rows.shape[0], BLOCK], tl.float32)
    for start in range(0, weight.columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < weight.columns
        place = weight.data + rows[:, None] * weight.row_stride + columns[None, :]
        values = tl.load(place, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
        total += values * tl.load(x + columns, mask=inside, other=0).to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _group_products(x, weight, rows, there, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """A group of 32 columns shares a scale; byte k of a group of int4 holds columns k and k + 16."""
    GROUPS: tl.constexpr = BLOCK // 32
    BYTES: tl.constexpr = 4 * BITS  # of a group
    total = tl.zeros([rows.shape[0], GROUPS], tl.float32)
    inner = tl.arange(0, BYTES)
    for start in range(0, weight.columns // 32, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        inside = groups < weight.columns // 32
        mask = there[:, None] & inside[None, :]
        scales = tl.load(weight.scales + rows[:, None] * weight.scale_stride + groups[None, :], mask=mask, other=0)
        place = (rows[:, None] * weight.row_stride + groups[None, :] * BYTES)[:, :, None] + inner[None, None, :]
        packed = tl.load(weight.data + place, mask=mask[:, :, None], other=0)
        columns = groups[:, None] * 32 + inner[None, :]
        first = tl.load(x + columns, mask=inside[:, None], other=0).to(tl.float32)[None, :, :]
        if BITS == 8:
            products = packed.to(tl.float32) * first
        else:
            second = tl.load(x + columns + 16, mask=inside[:, None], other=0).to(tl.float32)[None, :, :]
            products = ((packed & 15).to(tl.float32) - 8) * first + ((packed >> 4).to(tl.float32) - 8) * second
        total += tl.sum(products, axis=2) * scales.to(tl.float32)
    return tl.sum(total, axis=1)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation by its name in `reference.ACTIVATIONS`; none of them: x."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0)
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0)
        x = x * x
    return x
