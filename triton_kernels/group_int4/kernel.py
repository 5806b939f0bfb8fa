"""Kernels for kept int4 groups in GPU order (`layout.py`): on tensor cores, and in plain Triton for every GPU."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..int4.fragment import decode4_word, mma_diagonal, rescale, spread


@triton.jit
def fragment(
    codes,
    scales,
    index,
    order,
    unit_start,
    worker_start,
    x,
    bias,
    y,
    M,
    N,
    width,
    units,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y[m, n] = sum_k x[m, k] W[n, k] + bias[n]` for `TOKENS` tokens per program of grid axis 0.

    A tile's warps take units in turns, `UNROLL` at a time, and add up once at its end, in fixed order. Every row of a
    tile reads its own columns of x, so a matrix product of a set with the columns that its rows want has the results
    on its diagonal; the rest of it is thrown away, which tensor cores can afford. `x` is int32, two numbers of 16
    bits each, in rows of `width` numbers. Balanced by row, axis 1 of the grid counts tiles of `units`; over the
    layer, workers.
    """
    e = tl.arange(0, 128 * WARPS)[None, :]
    warp, word = e // 128, e % 128
    # Differences of quotients: the compiler sees that these are equal for four words in a row.
    g, t, i = e // 16 - e // 128 * 8, e // 4 - e // 16 * 4, e % 4
    pairs = tl.multiple_of(width, 16) // 2  # of numbers in a row of x
    if worker_start is None:
        first_tile = tl.program_id(1)
        last_tile = first_tile + 1
    else:
        first_tile = tl.load(worker_start + tl.program_id(1))
        last_tile = tl.load(worker_start + tl.program_id(1) + 1)
    for tile in range(first_tile, last_tile):
        if unit_start is None:
            start = tile * units
        else:
            start = tl.load(unit_start + tile)
            units = tl.load(unit_start + tile + 1) - start
        totals = ()
        for _ in tl.static_range(TOKENS):
            totals = totals + (tl.zeros((1, 128 * WARPS), tl.float32),)  # noqa: RUF005
        for first in range(0, units, WARPS * UNROLL):
            for u in tl.static_range(UNROLL):
                unit = first + warp * UNROLL + u
                totals = _unit(
                    codes,
                    scales,
                    index,
                    x,
                    pairs,
                    M,
                    start,
                    unit,
                    units,
                    word,
                    g,
                    t,
                    i,
                    totals,
                    GROUP,
                    BF16,
                    TOKENS,
                    EVEN,
                )
        place = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
        row = _rows(order, tile, place)
        inside = (row >= 0) & (row < N)
        for m in tl.static_range(TOKENS):
            own = tl.where(t * 2 + i % 2 == g, totals[m], 0.0)
            result = tl.sum(tl.sum(tl.sum(tl.reshape(own, (WARPS, 8, 4, 2, 2)), 4), 2), 0)
            if bias is not None:
                result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
            token = tl.program_id(0) * TOKENS + m
            tl.store(y + token * N + row, result.to(y.dtype.element_ty), mask=inside & (token < M))


@triton.jit
def _unit(
    codes, scales, index, x, pairs, M, start, unit, units, word, g, t, i, totals,
    GROUP: tl.constexpr, BF16: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`totals` (of each token) plus the sums of a unit of sets. Past the last unit: its groups, with scales of 0."""
    STEPS: tl.constexpr = (
        1 if GROUP == 8 else GROUP // 16
    )  # k16 steps, each a word, of a set (of two, when they have 8)
    QUADS: tl.constexpr = 2 if GROUP == 8 else 1
    inside = unit < units
    if not EVEN:
        unit = tl.minimum(unit, units - 1)
    unit += start
    blocks = codes + unit.to(tl.int64) * (128 * STEPS) + word
    if STEPS == 1:
        words = tl.load(blocks, eviction_policy="evict_first")
    for quad in tl.static_range(QUADS):
        address = (unit * QUADS + quad) * 32 + g * 4 + i
        numbers = tl.load(index + address, eviction_policy="evict_first")
        if EVEN:
            scale = tl.load(scales + address, eviction_policy="evict_first")
        else:
            scale = tl.load(scales + address, mask=inside, other=0, eviction_policy="evict_first")
        for j in tl.static_range(4):
            if STEPS > 1 and j * STEPS % 4 == 0:
                words = tl.load(blocks + j * STEPS // 4 * 128, eviction_policy="evict_first")
            new = ()
            for m in tl.static_range(TOKENS):
                row = x + tl.minimum(tl.program_id(0) * TOKENS + m, M - 1) * pairs
                sums = _set(words, numbers, row, t, i, quad, j, GROUP, STEPS, BF16)
                new = new + (rescale(scale, sums, totals[m], j),)  # noqa: RUF005
            totals = new
    return totals


@triton.jit
def _set(
    words, numbers, x, t, i,
    QUAD: tl.constexpr, J: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """The sums of set `J` of a quad for one token."""
    sums = tl.zeros(words.shape, tl.float32)
    if GROUP == 8:
        low, high = _gather(x, numbers, t, 4, 1)
        a = decode4_word(words, numbers, QUAD * 2 + J // 2, J // 2 * 2, J // 2 * 2 + 1, BF16)
        if J % 2 == 0:
            sums = mma_diagonal(a, low, high, sums, J, -1, BF16)
        else:
            sums = mma_diagonal(a, low, high, sums, -1, J, BF16)
    elif GROUP == 16:
        both = spread(numbers, J // 2 * 2, J // 2 * 2, J // 2 * 2 + 1, J // 2 * 2 + 1)
        low, high = _gather(x, both, t * 2 + i % 2, 8, 2)
        a = decode4_word(words, numbers, J, J, J, BF16)
        sums = mma_diagonal(a, low, high, sums, J % 2 * 2, J % 2 * 2 + 1, BF16)
    else:
        for step in tl.static_range(STEPS):
            if step % 2 == 0:
                low, high = _gather(x, spread(numbers, J, J, J, J), step * 8 + t * 4 + i, GROUP // 2, 4)
            a = decode4_word(words, numbers, (J * STEPS + step) % 4, J, J, BF16)
            sums = mma_diagonal(a, low, high, sums, step % 2 * 2, step % 2 * 2 + 1, BF16)
    return sums


@triton.jit
def _gather(x, numbers, offset, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pairs of x at `offset` in the groups of rows g and g + 8; `SIZE`: pairs in a group, `VECTOR`: in a row."""
    low = ((numbers >> 8) & 4095) * SIZE + offset
    high = ((numbers >> 20) & 4095) * SIZE + offset
    low = tl.max_contiguous(tl.multiple_of(low, [1, VECTOR]), [1, VECTOR])
    high = tl.max_contiguous(tl.multiple_of(high, [1, VECTOR]), [1, VECTOR])
    return tl.load(x + low, eviction_policy="evict_last"), tl.load(x + high, eviction_policy="evict_last")


@triton.jit
def simt(
    codes,
    scales,
    index,
    order,
    unit_start,
    worker_start,
    x,
    bias,
    y,
    M,
    N,
    width,
    units,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The same in fp32 on any GPU: four lanes per block of codes, each with pairs of columns of rows g and g + 8."""
    STEPS: tl.constexpr = 1 if GROUP == 8 else GROUP // 16  # blocks of a unit
    pairs = tl.multiple_of(width, 16) // 2
    g3, i3 = tl.arange(0, 8)[:, None, None], tl.arange(0, 4)[None, None, :]
    u3, u = tl.arange(0, LANES)[None, :, None], tl.arange(0, LANES)[None, :]
    g = tl.arange(0, 8)[:, None]
    if worker_start is None:
        first_tile = tl.program_id(1)
        last_tile = first_tile + 1
    else:
        first_tile = tl.load(worker_start + tl.program_id(1))
        last_tile = tl.load(worker_start + tl.program_id(1) + 1)
    for tile in range(first_tile, last_tile):
        if unit_start is None:
            start = tile * units
        else:
            start = tl.load(unit_start + tile)
            units = tl.load(unit_start + tile + 1) - start
        sums = ()
        for _ in tl.static_range(2 * TOKENS):
            sums = sums + (tl.zeros((8, LANES), tl.float32),)  # noqa: RUF005
        for first in range(0, units * STEPS, LANES // 4):
            block = start * STEPS + tl.minimum(first + u3 // 4, units * STEPS - 1)
            four = tl.load(
                codes + block.to(tl.int64) * 128 + (g3 * 16 + u3 % 4 * 4 + i3), eviction_policy="evict_first"
            )
            words = _split(four, LANES)
            inside = first + u // 4 < units * STEPS
            block2 = start * STEPS + tl.minimum(first + u // 4, units * STEPS - 1)
            for i in tl.static_range(4):
                for c in tl.static_range(2):
                    if c == 0 or GROUP == 8:
                        numbers, scale_low, scale_high = _entry(index, scales, block2, g, inside, i, c, GROUP)
                    w_low = _two(words[i], numbers, 2 * c)
                    w_high = _two(words[i], numbers, 2 * c + 1)
                    new = ()
                    for m in tl.static_range(TOKENS):
                        row = x + tl.minimum(tl.program_id(0) * TOKENS + m, M - 1) * pairs + _pair(u % 4, i, c, GROUP)
                        x_low = tl.load(row + ((numbers >> 8) & 4095) * (GROUP // 2), eviction_policy="evict_last")
                        x_high = tl.load(row + ((numbers >> 20) & 4095) * (GROUP // 2), eviction_policy="evict_last")
                        new = new + (sums[2 * m] + _product(w_low, x_low, BF16) * scale_low,)  # noqa: RUF005
                        new = new + (sums[2 * m + 1] + _product(w_high, x_high, BF16) * scale_high,)  # noqa: RUF005
                    sums = new
        place = tl.arange(0, 8)
        for m in tl.static_range(2 * TOKENS):
            row = _rows(order, tile, place + m % 2 * 8)
            inside_y = (row >= 0) & (row < N)
            result = tl.sum(sums[m], 1)
            if bias is not None:
                result += tl.load(bias + row, mask=inside_y, other=0.0).to(tl.float32)
            token = tl.program_id(0) * TOKENS + m // 2
            tl.store(y + token * N + row, result.to(y.dtype.element_ty), mask=inside_y & (token < M))


@triton.jit
def expand(
    codes, scales, index, order, unit_start, weight, N, K, units, GROUP: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Write the kept groups into `weight[N, K]`, which holds zeros, rounded once to its dtype. Grid: tiles."""
    STEPS: tl.constexpr = 1 if GROUP == 8 else GROUP // 16
    g3, i3 = tl.arange(0, 8)[:, None, None], tl.arange(0, 4)[None, None, :]
    u3, u = tl.arange(0, LANES)[None, :, None], tl.arange(0, LANES)[None, :]
    g = tl.arange(0, 8)[:, None]
    tile = tl.program_id(0)
    if unit_start is None:
        start = tile * units
    else:
        start = tl.load(unit_start + tile)
        units = tl.load(unit_start + tile + 1) - start
    row_low, row_high = _rows(order, tile, g), _rows(order, tile, g + 8)
    for first in range(0, units * STEPS, LANES // 4):
        block = start * STEPS + tl.minimum(first + u3 // 4, units * STEPS - 1)
        four = tl.load(codes + block.to(tl.int64) * 128 + (g3 * 16 + u3 % 4 * 4 + i3), eviction_policy="evict_first")
        words = _split(four, LANES)
        inside = first + u // 4 < units * STEPS
        block2 = start * STEPS + tl.minimum(first + u // 4, units * STEPS - 1)
        for i in tl.static_range(4):
            for c in tl.static_range(2):
                if c == 0 or GROUP == 8:
                    numbers, scale_low, scale_high = _entry(index, scales, block2, g, inside, i, c, GROUP)
                column = _pair(u % 4, i, c, GROUP) * 2
                w_low, w_high = _two(words[i], numbers, 2 * c), _two(words[i], numbers, 2 * c + 1)
                _scatter(weight, w_low, scale_low, row_low, ((numbers >> 8) & 4095) * GROUP + column, N, K)
                _scatter(weight, w_high, scale_high, row_high, ((numbers >> 20) & 4095) * GROUP + column, N, K)


@triton.jit
def _scatter(weight, values, scale, row, column, N, K):
    """Store two columns. Groups of scale 0 are 0 already, and so padding, which claims to be group 0, harms nobody."""
    h = tl.arange(0, 2)[None, None, :]
    scaled = tl.join(values[0] * scale, values[1] * scale)
    target = weight + row.to(tl.int64)[:, :, None] * K + column[:, :, None] + h
    inside = ((row >= 0) & (row < N) & (scale > 0))[:, :, None] & (column[:, :, None] + h < K)
    tl.store(target, scaled.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _rows(order, tile, place):
    if order is None:
        row = tile * 16 + place
    else:
        row = tl.load(order + tile * 16 + place)
    return row


@triton.jit
def _split(four, LANES: tl.constexpr):
    """`[8, LANES, 4]` -> its four planes; a lane holds all four already."""
    even, odd = tl.split(tl.reshape(four, (8, LANES, 2, 2)))
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    return word0, word1, word2, word3


@triton.jit
def _entry(index, scales, block, g, inside, I: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr):
    """`index` of the set that word `I` (its field `C`) of each block belongs to, and its scales in fp32, 0 outside."""
    if GROUP == 8:
        address = (block * 2 + I // 2) * 32 + (I % 2 * 2 + C)
    elif GROUP == 16:
        address = block * 32 + I
    elif GROUP == 32:
        address = block // 2 * 32 + block % 2 * 2 + I // 2
    else:
        address = block // 4 * 32 + block % 4
    numbers = tl.load(index + address + g * 4)
    pair = tl.load(scales + address + g * 4, mask=inside, other=0)
    scale_low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale_high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return numbers, scale_low, scale_high


@triton.jit
def _two(word, numbers, FIELD: tl.constexpr):
    """Columns h = 0 and 1 of field `FIELD` (2 c + half) minus their zero point, in fp32."""
    zero = (numbers >> (4 * (FIELD % 2))) & 15
    first = ((word >> (4 * FIELD)) & 15) - zero
    second = ((word >> (4 * FIELD + 16)) & 15) - zero
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _pair(t, I: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr):
    """Which pair of columns of a group a lane holds in word `I`, field `C`."""
    if GROUP == 8:
        pair = t
    elif GROUP == 16:
        pair = t * 2 + C
    elif GROUP == 32:
        pair = t * 4 + (I % 2 * 2 + C)
    else:
        pair = t * 4 + (I // 2 * 16 + I % 2 * 2 + C)
    return pair


@triton.jit
def _product(values, pair, BF16: tl.constexpr):
    """Two weights times two 16-bit numbers in an int32, in fp32."""
    if BF16:
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return values[0] * first + values[1] * second
