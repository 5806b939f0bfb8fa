"""Kernels for dense integers in GPU order (`layout.py`): on tensor cores, and in plain Triton for every GPU."""

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
    spans,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k] + bias[n]` for up to `8 * TOKEN_TILES` tokens.

    A program owns `WARPS_N` tiles of 16 rows; `WARPS_K` warps share the columns of a tile, `SPAN` at a time in turns,
    and add up once after the loop, in fixed order. `x` is int32, two numbers of 16 bits each. `blocks`, `quads`: of
    one tile, in `codes` and `scales`. Without `EVEN` the last spans reach past K: they read their neighbours' weights
    and zeros for x.
    """
    BLOCK: tl.constexpr = 256 // BITS  # columns
    GROUP_COLUMNS: tl.constexpr = GROUP if GROUP else SPAN
    WARPS: tl.constexpr = WARPS_N * WARPS_K
    e = tl.arange(0, 128 * WARPS)[None, :]
    warp, word = e // 128, e % 128
    # Differences of quotients: the compiler sees that these are equal for four words in a row, and loads 16 bytes at
    # once.
    g, t, i = e // 16 - e // 128 * 8, e // 4 - e // 16 * 4, e % 4
    k_warp = warp % WARPS_K
    tile = tl.program_id(0) * WARPS_N + warp // WARPS_K
    if WARPS_N > 1:
        tile = tl.minimum(tile, (N + 15) // 16 - 1)
    codes += tile.to(tl.int64) * (blocks * 128) + word
    scales += tile * (quads * 32) + g * 4 + i
    if zeros is not None:
        zeros += tile * (quads * (BITS * 2)) + g * (BITS // 4)
    token = tl.minimum(tl.arange(0, TOKEN_TILES)[:, None] * 8 + g, M - 1)
    x += token * (K // 2) + t * 4 + i
    total = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
    sums = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
    middle = tl.full((1, 128 * WARPS), 1 << (BITS - 1), tl.int32)
    low, high = zero_constants(middle, middle, BITS, BF16)
    if not GROUP:
        scale = tl.load(scales)
        if zeros is not None:
            low, high = _zeros(zeros, i, 0, BITS, BF16)
    for first in range(0, spans, WARPS_K):
        span = first + k_warp
        for unit in tl.static_range(SPAN // 32):
            if GROUP and unit * 32 % GROUP_COLUMNS == 0:
                sums = tl.zeros((TOKEN_TILES, 128 * WARPS), tl.float32)
                if unit * 32 % (4 * GROUP_COLUMNS) == 0:
                    quad = span * (SPAN // (4 * GROUP_COLUMNS)) + unit * 32 // (4 * GROUP_COLUMNS)
                    if not EVEN:
                        quad = tl.minimum(quad, quads - 1)
                    scale = tl.load(scales + quad * 32, eviction_policy="evict_first")
                if zeros is not None:
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
                b = tl.load(x + (span * (SPAN // 2) + unit * 16), mask=inside, other=0, eviction_policy="evict_last")
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
    if bias is not None:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + row, result.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def _zeros(zeros, i, GROUP: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Register constants for the zero points of rows g and g + 8 in group `GROUP` of a quad."""
    if BITS == 4:
        pair = tl.load(zeros + 0 * i) >> (8 * GROUP)
        low, high = pair & 15, (pair >> 4) & 15
    else:
        low = (tl.load(zeros + 0 * i) >> (8 * GROUP)) & 255
        high = (tl.load(zeros + 0 * i + 1) >> (8 * GROUP)) & 255
    return zero_constants(low, high, BITS, BF16)


@triton.jit
def simt(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k] + bias[n]` for up to `TOKENS` tokens, in fp32, on any GPU.

    A program owns `2 * ROWS` rows of a tile; a lane takes four words (16 or 8 columns of each row) in a trip, so that
    an activation is loaded and converted once for all of its rows. A nibble is converted where it stands: `q & (15 <<
    4 n)` is its value times 16^n, and x is divided by 16^n instead, which is exact.
    """
    BLOCK: tl.constexpr = 256 // BITS
    parts: tl.constexpr = 8 // ROWS
    tile = tl.program_id(0) // parts
    first_row = tl.program_id(0) % parts * ROWS
    g = first_row + tl.arange(0, ROWS)[None, :, None]
    u = tl.arange(0, LANES)[None, None, :]
    token = tl.minimum(tl.arange(0, TOKENS)[:, None, None], M - 1)
    codes += tile.to(tl.int64) * (blocks * 128)
    codes += (first_row + tl.arange(0, ROWS)[:, None, None]) * 16 + tl.arange(0, 4)[None, None, :]
    lane = tl.arange(0, LANES)[None, :, None]
    x += token * K + (u // 4 * BLOCK + u % 4 * 8)
    low = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
    high = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
    for first_block in range(0, blocks, LANES // 4):
        block = first_block + lane // 4
        if not EVEN:
            block = tl.minimum(block, blocks - 1)
        four = tl.load(codes + (block * 128 + lane % 4 * 4), eviction_policy="evict_first")
        even, odd = tl.split(tl.reshape(four, (1, ROWS, LANES, 2, 2)))
        word0, word2 = tl.split(even)
        word1, word3 = tl.split(odd)
        words = (word0, word1, word2, word3)
        start = first_block * BLOCK
        first = start + u // 4 * BLOCK
        part_low = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
        part_high = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
        x_sum = tl.zeros((TOKENS, 1, LANES), tl.float32)
        for i in tl.static_range(4):
            for j in tl.static_range(16 // BITS):
                offset = (i // 2 * 32 + i % 2 * 4 + j) if BITS == 4 else (i * 2 + j)
                if EVEN:
                    xj = tl.load(x + (start + offset), eviction_policy="evict_last").to(tl.float32)
                else:
                    inside = first + u % 4 * 8 + offset < K
                    xj = tl.load(x + (start + offset), mask=inside, other=0.0, eviction_policy="evict_last")
                    xj = xj.to(tl.float32)
                x_sum += xj
                if BITS == 4:
                    part_low += _nibble(words[i], j % 2 * 4 + j // 2 * 2, xj)
                    part_high += _nibble(words[i], j % 2 * 4 + j // 2 * 2 + 1, xj)
                else:
                    part_low += ((words[i] >> (8 * j)) & 255).to(tl.float32) * xj
                    part_high += ((words[i] >> (8 * j + 16)) & 255).to(tl.float32) * xj
            if i == 3 or (BITS == 4 and GROUP == 32 and i == 1):
                scale_low, scale_high, zero_low, zero_high = _group(
                    scales, zeros, tile * quads, quads, first + (i // 2 * 32 if BITS == 4 else 0), g, BITS, GROUP, EVEN
                )
                low += (part_low - x_sum * zero_low) * scale_low
                high += (part_high - x_sum * zero_high) * scale_high
                part_low = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
                part_high = tl.zeros((TOKENS, ROWS, LANES), tl.float32)
                x_sum = tl.zeros((TOKENS, 1, LANES), tl.float32)
    token = tl.arange(0, TOKENS)[:, None]
    row = tile * 16 + first_row + tl.arange(0, ROWS)[None, :]
    _store(y, bias, tl.sum(low, 2), token, row, M, N)
    _store(y, bias, tl.sum(high, 2), token, row + 8, M, N)


@triton.jit
def _nibble(words, INDEX: tl.constexpr, x):
    """Nibble `INDEX` of each word times `x`, in fp32."""
    if INDEX == 7:  # the sign bit is in the way
        product = ((words >> 28) & 15).to(tl.float32) * x
    else:
        product = (words & (15 << (4 * INDEX))).to(tl.float32) * (x * (1.0 / 16**INDEX))
    return product


@triton.jit
def _group(
    scales, zeros, first_quad, quads, column, g,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of rows g and g + 8, in fp32, for the group that each of `column` lies in."""
    group = column // GROUP if GROUP else column * 0
    if not EVEN:
        group = tl.minimum(group, quads * 4 - 1)
    quad = first_quad + group // 4
    pair = tl.load(scales + quad * 32 + g * 4 + group % 4)
    scale_low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale_high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if zeros is None:
        zero_low, zero_high = (1 << (BITS - 1)) * 1.0, (1 << (BITS - 1)) * 1.0
    elif BITS == 4:
        # `g * 4 // 4` hides that neighbouring rows lie side by side: loads of several rows at once would ask for
        # another arrangement of the tile than the weights have, and so for shared memory.
        both = tl.load(zeros + quad * 8 + g * 4 // 4) >> (group % 4 * 8)
        zero_low, zero_high = (both & 15).to(tl.float32), ((both >> 4) & 15).to(tl.float32)
    else:
        both = zeros + quad * 16 + g * 2
        zero_low = ((tl.load(both) >> (group % 4 * 8)) & 255).to(tl.float32)
        zero_high = ((tl.load(both + 1) >> (group % 4 * 8)) & 255).to(tl.float32)
    return scale_low, scale_high, zero_low, zero_high


@triton.jit
def _store(y, bias, result, token, row, M, N):
    if bias is not None:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + row, result.to(y.dtype.element_ty), mask=(token < M) & (row < N))


@triton.jit
def expand(
    codes,
    scales,
    zeros,
    weight,
    N,
    K,
    blocks,
    quads,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The dense `weight[N, K]`, rounded once to its dtype. Grid: tiles of 16 rows, steps of `WORDS / 16` blocks."""
    tile, step = tl.program_id(0), tl.program_id(1)
    g = tl.arange(0, 8)[:, None]
    low, high = _values(codes, scales, zeros, tile, g, step * (WORDS // 16), blocks, quads, BITS, GROUP, WORDS)
    column = _columns(step * (WORDS // 16), BITS, WORDS)[None, :]
    target = weight + (tile * 16 + g).to(tl.int64) * K + column
    tl.store(target, low.to(weight.dtype.element_ty), mask=(tile * 16 + g < N) & (column < K))
    tl.store(target + 8 * K, high.to(weight.dtype.element_ty), mask=(tile * 16 + 8 + g < N) & (column < K))


@triton.jit
def dot(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """`y = x W^T + bias` for up to `TOKENS` tokens; weights are expanded on chip, rounded once to `DOT_DTYPE`."""
    rows = tl.arange(0, 8 * TILES)[:, None]
    tile = tl.minimum(tl.program_id(0) * TILES + rows // 8, (N + 15) // 16 - 1)
    token = tl.arange(0, TOKENS)[None, :]
    x += tl.minimum(token, M - 1) * K
    low = tl.zeros((8 * TILES, TOKENS), tl.float32)
    high = tl.zeros((8 * TILES, TOKENS), tl.float32)
    for block in range(0, blocks, WORDS // 16):
        w_low, w_high = _values(codes, scales, zeros, tile, rows % 8, block, blocks, quads, BITS, GROUP, WORDS)
        column = _columns(block, BITS, WORDS)[:, None]
        xs = tl.load(x + column, mask=column < K, other=0.0, eviction_policy="evict_last").to(DOT_DTYPE)
        low = tl.dot(w_low.to(DOT_DTYPE), xs, low, input_precision="ieee")
        high = tl.dot(w_high.to(DOT_DTYPE), xs, high, input_precision="ieee")
    row = tl.program_id(0) * (TILES * 16) + rows // 8 * 16 + rows % 8
    _store(y, bias, low, token, row, M, N)
    _store(y, bias, high, token, row + 8, M, N)


@triton.jit
def _columns(first_block, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The columns of what `_values` returns, in its order."""
    if BITS == 8:
        column = tl.arange(0, WORDS * 2)
    else:
        e = tl.arange(0, WORDS * 4)
        column = e // 64 * 64 + (e // 8 - e // 16 * 2) * 32 + (e // 16 - e // 64 * 4) * 8 + e % 8
    return first_block * (256 // BITS) + column


@triton.jit
def _values(
    codes, scales, zeros, tile, g, first_block, blocks, quads,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`WORDS / 16` blocks of rows g and of rows g + 8, in fp32. Past the last block: its values again."""
    w = tl.arange(0, WORDS)[None, :]
    block = tl.minimum(first_block + w // 16, blocks - 1)
    words = tl.load(
        codes + tile.to(tl.int64) * (blocks * 128) + block * 128 + g * 16 + w % 16, eviction_policy="evict_first"
    )
    if BITS == 4:
        column = block * 64 + w % 4 // 2 * 32
    else:
        column = block * 32
    scale_low, scale_high, zero_low, zero_high = _group(
        scales, zeros, tile * quads, quads, column, g, BITS, GROUP, False
    )
    if BITS == 4:
        low02 = tl.join(
            ((words & 15).to(tl.float32) - zero_low) * scale_low,
            (((words >> 8) & 15).to(tl.float32) - zero_low) * scale_low,
        )
        low13 = tl.join(
            (((words >> 16) & 15).to(tl.float32) - zero_low) * scale_low,
            (((words >> 24) & 15).to(tl.float32) - zero_low) * scale_low,
        )
        high02 = tl.join(
            (((words >> 4) & 15).to(tl.float32) - zero_high) * scale_high,
            (((words >> 12) & 15).to(tl.float32) - zero_high) * scale_high,
        )
        high13 = tl.join(
            (((words >> 20) & 15).to(tl.float32) - zero_high) * scale_high,
            (((words >> 28) & 15).to(tl.float32) - zero_high) * scale_high,
        )
        low = tl.reshape(tl.join(low02, low13), (low02.shape[0], WORDS * 4))
        high = tl.reshape(tl.join(high02, high13), (low02.shape[0], WORDS * 4))
    else:
        low = tl.join(
            ((words & 255).to(tl.float32) - zero_low) * scale_low,
            (((words >> 8) & 255).to(tl.float32) - zero_low) * scale_low,
        )
        high = tl.join(
            (((words >> 16) & 255).to(tl.float32) - zero_high) * scale_high,
            (((words >> 24) & 255).to(tl.float32) - zero_high) * scale_high,
        )
        low = tl.reshape(low, (low.shape[0], WORDS * 2))
        high = tl.reshape(high, (high.shape[0], WORDS * 2))
    return low, high
