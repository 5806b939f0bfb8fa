"""Kernels for dense integers in GPU order (`layout.py`): one that runs on tensor cores, and plain Triton for every GPU."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .fragment import decode4, decode8, mma, rescale, zero_constants


@triton.jit
def fragment(
    codes,
    scales,
    zeros,
    x,
    bias,
    y,
    M,
    N,
    K,
    blocks,
    quads,
    trips,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BF16: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k] + bias[n]` for up to `8 * TOKEN_TILES` tokens.

    A program owns `WARPS_N` tiles of 16 rows; `WARPS_K` warps share the columns of a tile, `SPAN` at a time in turns, and add up
    once after the loop, in fixed order. `x` is int32, two numbers of 16 bits each. `blocks`, `quads`: of one tile, in `codes`
    and `scales`. Without `EVEN` the last spans reach past K: they read their neighbours' weights and zeros for x.
    """
    BLOCK: tl.constexpr = 256 // BITS  # columns
    GROUP_COLUMNS: tl.constexpr = GROUP if GROUP else SPAN
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    e = tl.arange(0, 128 * WARPS)[None, :]
    warp, word = e // 128, e % 128
    # Differences of quotients: the compiler sees that these are equal for four words in a row, and loads 16 bytes at once.
    g, t, i = e // 16 - e // 128 * 8, e // 4 - e // 16 * 4, e % 4
    k_warp = warp % WARPS_K
    tile = tl.program_id(0) * WARPS_N + warp // WARPS_K
    if WARPS_N > 1:
        tile = tl.minimum(tile, (N + 15) // 16 - 1)
    codes += tile.to(tl.int64) * (blocks * 128) + word
    scales += tile * (quads * 32) + g * 4 + i
    zeros += tile * (quads * (BITS * 2)) + g * (BITS // 4)
    token = tl.minimum(tl.arange(0, TOKEN_TILES)[:, None] * 8 + g, M - 1)
    x += token * (K // 2) + t * 4 + i
    total = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
    sums = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
    middle = tl.full((1, 128 * WARPS), 1 << (BITS - 1), tl.int32)
    low, high = zero_constants(middle, middle, BITS, BF16)
    if not GROUP:
        scale = tl.load(scales)
        if ASYMMETRIC:
            low, high = _zeros(zeros, i, 0, BITS, BF16)
    for trip in range(0, trips):
        span = trip * WARPS_K + k_warp
        for unit in tl.static_range(SPAN // 32):
            if GROUP and unit * 32 % GROUP_COLUMNS == 0:
                sums = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
                if unit * 32 % (4 * GROUP_COLUMNS) == 0:
                    quad = span * (SPAN // (4 * GROUP_COLUMNS)) + unit * 32 // (4 * GROUP_COLUMNS)
                    if not EVEN:
                        quad = tl.minimum(quad, quads - 1)
                    scale = tl.load(scales + quad * 32, eviction_policy="evict_first")
                if ASYMMETRIC:
                    low, high = _zeros(zeros + quad * (BITS * 2), i, unit * 32 // GROUP_COLUMNS % 4, BITS, BF16)
            if unit * 32 % BLOCK == 0:
                block = span * (SPAN // BLOCK) + unit * 32 // BLOCK
                if not EVEN:
                    block = tl.minimum(block, blocks - 1)
                words = tl.load(codes + block * 128, eviction_policy="evict_first")
            column = span * SPAN + unit * 32
            if EVEN:
                b = tl.load(x + (span * (SPAN // 2) + unit * 16), eviction_policy="evict_last")
            else:
                inside = column + t * 8 < K
                b = tl.load(
                    x + (span * (SPAN // 2) + unit * 16), mask=inside, other=0, eviction_policy="evict_last"
                )
            if BITS == 4:
                step0, step1, step2, step3 = decode4(words, low, high, BF16)
                if unit % 2 == 0:
                    sums = mma(step1, b, mma(step0, b, sums, 0, BF16), 1, BF16)
                else:
                    sums = mma(step3, b, mma(step2, b, sums, 0, BF16), 1, BF16)
            else:
                step0, step1 = decode8(words, low, high, BF16)
                sums = mma(step1, b, mma(step0, b, sums, 0, BF16), 1, BF16)
            if GROUP and (unit + 1) * 32 % GROUP_COLUMNS == 0:
                total = rescale(scale, sums, total, unit * 32 // GROUP_COLUMNS % 4)
    if not GROUP:
        total = rescale(scale, sums, total, 0)
    parts = tl.reshape(total, (TOKEN_TILES, WARPS_N, WARPS_K, 128))
    result = tl.sum(parts, 2)
    e = tl.arange(0, 128)[None, None, :]
    row = (tl.program_id(0) * WARPS_N + tl.arange(0, WARPS_N)[None, :, None]) * 16 + e // 16 + e % 4 // 2 * 8
    token = tl.arange(0, TOKEN_TILES)[:, None, None] * 8 + e % 16 // 4 * 2 + e % 2
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + row, result.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def _zeros(zeros, i, GROUP: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Register constants for the zero points of rows g and g + 8 in group `GROUP` of a quad."""
    if BITS == 4:
        pair = tl.load(zeros + 0 * i, eviction_policy="evict_first") >> (8 * GROUP)
        return zero_constants(pair & 15, (pair >> 4) & 15, BITS, BF16)
    low = (tl.load(zeros + 0 * i, eviction_policy="evict_first") >> (8 * GROUP)) & 255
    high = (tl.load(zeros + 0 * i + 1, eviction_policy="evict_first") >> (8 * GROUP)) & 255
    return zero_constants(low, high, BITS, BF16)
