"""Embedding rows out of integers in the GPU order of `int4`, so that lookup and head share one set of tensors."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lookup(
    ids,
    codes,
    scales,
    zeros,
    out,
    V,
    H,
    blocks,
    quads,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out[t] = W[ids[t]]`, rounded once; NaN for an id outside 0..V-1. Grid: tokens, steps of `BLOCK` columns.

    In this order rows g and g + 8 of a tile share their words, so a row costs the bytes of two.
    """
    token = tl.program_id(0)
    row = tl.load(ids + token)
    known = (row >= 0) & (row < V)
    row = tl.where(known, row, 0)
    tile, g, half = row // 16, row % 8, (row % 16 // 8).to(tl.int32)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if BITS == 4:
        word = column // 64 * 128 + column % 32 // 8 * 4 + column % 64 // 32 * 2 + column % 8 // 4
        shift = column % 2 * 16 + column % 4 // 2 * 8 + half * 4
    else:
        word = column // 32 * 128 + column % 8 // 2 + column % 32 // 8 * 4
        shift = half * 16 + column % 2 * 8
    group = column // GROUP if GROUP else column * 0
    code = tl.load(codes + tile.to(tl.int64) * blocks * 128 + g * 16 + word, mask=inside, other=0)
    quad = tile.to(tl.int64) * quads + group // 4
    pair = tl.load(scales + quad * 32 + g * 4 + group % 4, mask=inside, other=0)
    scale = (pair >> (half * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if zeros is None:
        zero = 1 << (BITS - 1)
    elif BITS == 4:
        zero = (tl.load(zeros + quad * 8 + g, mask=inside, other=0) >> (group % 4 * 8 + half * 4)) & 15
    else:
        zero = (tl.load(zeros + quad * 16 + g * 2 + half, mask=inside, other=0) >> (group % 4 * 8)) & 255
    value = (((code >> shift) & ((1 << BITS) - 1)) - zero).to(tl.float32) * scale
    value = tl.where(known, value, float("nan"))
    tl.store(out + token.to(tl.int64) * H + column, value.to(out.dtype.element_ty), mask=inside)
