"""Triton kernels of input-selected linears with 16-bit weights.

The weight lies input-major, `[K + rank, columns]`: one row per input, then `U^T`, whose inputs are z of the low-rank
branch. A row is loaded under a mask that says whether any token selects its input, so an unselected row moves no bytes.
Both kernels also compute z itself (`REST`): the same product, over the inputs that a part does not select.

All grids are `(column tiles, slices of K)`. `tiles[tile]` holds `(part, first output column, end, 0)`: no tile spans
two fused parts, whose thresholds differ. `cut` finds tokens' own thresholds `[M, parts]` beforehand (`TOPK`). With
`PARTIAL` the fp32 sums of each slice go to `out[slice, token, column]`; sums of `ADDENDS` slices that an earlier launch
left so in `addend` are added, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _selected(values, norms, rows, inside, threshold, NORMS: tl.constexpr, REST: tl.constexpr):
    """Whether a token's input is used: selected, or (REST) not selected. NaN counts as selected, zero never does."""
    score = tl.abs(values)
    if NORMS:
        score *= tl.load(norms + rows, mask=inside, other=0.0)
    if REST:
        return (score <= threshold) & (values != 0)
    # Not `score > threshold`: a NaN must reach the output of its own token.
    return (score <= threshold) == 0


@triton.jit
def _halves(word, BF16: tl.constexpr):
    """The two 16-bit floats of an int32, low bits first, as fp32."""
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _add(total, tile, value, BF16: tl.constexpr):
    """`total` plus the rows of `tile` times a value each. bf16 comes as int32 of two columns and has two totals: even
    and odd columns, which are one instruction away from fp32; fp16 is so anyway.
    """
    if BF16:
        even, odd = _halves(tile, True)
        return total[0] + even * value[:, None], total[1] + odd * value[:, None]
    return total[0] + tile.to(tl.float32) * value[:, None], total[1]


@triton.jit
def _fetch(
    inputs,
    rows,
    norms,
    threshold,
    k,
    stop,
    NORMS: tl.constexpr,
    REST: tl.constexpr,
    BF16: tl.constexpr,
    STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The values of UNROLL inputs per lane, and their rows where selected. Behind `stop` values are 0: not selected."""
    values = ()
    loaded = ()
    lanes = tl.arange(0, BLOCK_K)
    for u in tl.static_range(UNROLL // 4):
        row = k + 4 * (u * BLOCK_K + lanes)
        four = tl.load(inputs + u * BLOCK_K, mask=row < stop, other=0)
        values += _halves(four.to(tl.int32), BF16) + _halves((four >> 32).to(tl.int32), BF16)  # type: ignore[assignment]
    for u in tl.static_range(UNROLL):
        row = k + 4 * (u // 4 * BLOCK_K + lanes) + u % 4
        used = _selected(values[u], norms, row, row < stop, threshold, NORMS, REST)
        pointers = rows + (u // 4 * 4 * BLOCK_K + u % 4) * STRIDE
        loaded += (tl.load(pointers, mask=used[:, None], other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return values, loaded


@triton.jit
def cut(
    x,
    norms,
    counts,
    thresholds,
    K,
    stride_x,
    NORMS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`thresholds[token, part]`: the largest number below the `counts[part]`-th largest score of the token, 0 at least.
    Grid `(M, parts)`.

    Bits of floats >= 0 are ordered as the floats are, and NaN above all, so the bits of the score that is looked for
    are the largest that enough scores reach: one bit at a time. Only the first BITS after the sign are ever set.
    """
    token = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, BLOCK_K)
    inside = row < K
    score = tl.abs(tl.load(x + token * stride_x + row, mask=inside, other=0.0).to(tl.float32))
    if NORMS:
        score *= tl.load(norms + part * K + row, mask=inside, other=0.0)
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # infinity times a norm of 0 may be a negative NaN
    count = tl.load(counts + part)
    found = count * 0
    for step in range(BITS):
        trial = found | (1 << (30 - step))
        found = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= count, trial, found)
    found = tl.maximum(tl.minimum(found, 0x7F800000), 1) - 1
    tl.store(thresholds + token * tl.num_programs(1) + part, found.to(tl.float32, bitcast=True))


@triton.jit
def gemv(
    x,
    weight,
    thresholds,
    norms,
    z,
    tiles,
    bias,
    addend,
    out,
    N,
    K,
    RANK,
    slice_k,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    BIAS: tl.constexpr,
    REST: tl.constexpr,
    PARTIAL: tl.constexpr,
    Z_SLICES: tl.constexpr,
    ADDENDS: tl.constexpr,
    BF16: tl.constexpr,
    STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token: `out[n] = sum_k select(x)[k] weight[k, n] + sum_r z[r] weight[K + r, n] + bias[n]`.

    A warp holds 8 rows of 32 columns per load; the rows are summed once, after the loop. `x` is int64 of four inputs,
    zero-padded, whose rows one thread takes; bf16 `weight` is int32 of two columns. Its rows are STRIDE apart, a
    constant, so that the offsets of a trip's loads are part of their instructions. Rows are fetched a trip ahead of
    their use, so UNROLL loads of a thread are in flight.
    """
    tile = tl.program_id(0)
    part = 0
    first = tile * BLOCK_N
    end = N
    if PARTS > 1:
        part = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
    threshold = tl.load(thresholds + part)
    norms += part * K
    WIDTH: tl.constexpr = BLOCK_N // 2 if BF16 else BLOCK_N
    STEP: tl.constexpr = BLOCK_K * UNROLL
    lanes = tl.arange(0, BLOCK_K)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    start = tl.program_id(1) * slice_k
    stop = tl.minimum(start + slice_k, K)
    inputs = x + start // 4 + lanes
    rows = weight + (start + 4 * lanes).to(tl.int64)[:, None] * STRIDE + columns[None, :]
    total = (tl.zeros((BLOCK_K, WIDTH), tl.float32), tl.zeros((BLOCK_K, WIDTH), tl.float32))
    values, loaded = _fetch(inputs, rows, norms, threshold, start, stop, NORMS, REST, BF16, STRIDE, UNROLL, BLOCK_K)
    for k in range(start + STEP, stop + STEP, STEP):
        for u in tl.static_range(UNROLL):
            total = _add(total, loaded[u], values[u], BF16)
        inputs += STEP // 4
        rows += STEP * STRIDE
        values, loaded = _fetch(inputs, rows, norms, threshold, k, stop, NORMS, REST, BF16, STRIDE, UNROLL, BLOCK_K)
    if Z_SLICES:
        # The branch's rows are always read; slices of K share them out.
        for r in range(tl.program_id(1) * BLOCK_K, RANK, tl.num_programs(1) * BLOCK_K):
            rank = r + lanes
            value = tl.zeros((BLOCK_K,), tl.float32)
            for s in tl.static_range(Z_SLICES):
                value += tl.load(z + (s * PARTS + part) * RANK + rank, mask=rank < RANK, other=0.0)
            pointers = weight + (K + rank).to(tl.int64)[:, None] * STRIDE + columns[None, :]
            branch = tl.load(pointers, mask=(rank < RANK)[:, None], other=0, eviction_policy="evict_first")
            total = _add(total, branch, value, BF16)
    result = tl.sum(total[0], 0)
    if BF16:
        result = tl.join(result, tl.sum(total[1], 0)).reshape(BLOCK_N)
    column = first + tl.arange(0, BLOCK_N)
    for s in tl.static_range(ADDENDS):
        result += tl.load(addend + s * N + column, mask=column < end, other=0.0)
    if PARTIAL:
        out += tl.program_id(1) * N
    elif BIAS:
        result += tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < end)


@triton.jit
def _masked_inputs(
    x,
    norms,
    threshold,
    tokens,
    row,
    M,
    K,
    stop,
    stride_x,
    NORMS: tl.constexpr,
    REST: tl.constexpr,
):
    """x `[tokens, row]` where used, else 0, and which rows any token uses."""
    inside = row < stop
    value = tl.load(
        x + tokens[:, None] * stride_x + row[None, :], mask=(tokens < M)[:, None] & inside[None, :], other=0.0
    )
    used = _selected(value.to(tl.float32), norms, row[None, :], inside[None, :], threshold, NORMS, REST)
    return tl.where(used, value, 0.0), tl.max(used.to(tl.int32), 0) > 0


@triton.jit
def dot(
    x,
    weight,
    thresholds,
    norms,
    z,
    tiles,
    bias,
    addend,
    out,
    M,
    N,
    K,
    RANK,
    stride_x,
    stride_w,
    slice_k,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    BIAS: tl.constexpr,
    REST: tl.constexpr,
    PARTIAL: tl.constexpr,
    Z_SLICES: tl.constexpr,
    ADDENDS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOPK: tl.constexpr,
):
    """Up to BLOCK_M tokens: the product of `gemv` by tensor cores; the union of the tokens' selections is read, once.

    Weights are fetched one step ahead of their use. DOT: the type the product is formed in.
    """
    tile = tl.program_id(0)
    part = 0
    first = tile * BLOCK_N
    end = N
    if PARTS > 1:
        part = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
    norms += part * K
    tokens = tl.arange(0, BLOCK_M)
    if TOPK:
        threshold = tl.load(thresholds + tokens * PARTS + part, mask=tokens < M, other=0.0)[:, None]
    else:
        threshold = tl.load(thresholds + part)
    lanes = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * slice_k
    stop = tl.minimum(start + slice_k, K)
    rows = weight + tile * BLOCK_N + (start + lanes).to(tl.int64)[:, None] * stride_w + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    value, used = _masked_inputs(x, norms, threshold, tokens, start + lanes, M, K, stop, stride_x, NORMS, REST)
    loaded = tl.load(rows, mask=used[:, None], other=0.0, eviction_policy="evict_first")
    for k in range(start + BLOCK_K, stop + BLOCK_K, BLOCK_K):
        rows += BLOCK_K * stride_w
        ahead, used = _masked_inputs(x, norms, threshold, tokens, k + lanes, M, K, stop, stride_x, NORMS, REST)
        loaded_ahead = tl.load(rows, mask=used[:, None], other=0.0, eviction_policy="evict_first")
        total = tl.dot(value.to(DOT), loaded.to(DOT), total)
        value = ahead
        loaded = loaded_ahead
    if Z_SLICES:
        for r in range(tl.program_id(1) * BLOCK_R, RANK, tl.num_programs(1) * BLOCK_R):
            rank = r + tl.arange(0, BLOCK_R)
            inside = (tokens < M)[:, None] & (rank < RANK)[None, :]
            rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for s in tl.static_range(Z_SLICES):
                offsets = (s * M + tokens[:, None]) * (PARTS * RANK) + part * RANK + rank[None, :]
                rest += tl.load(z + offsets, mask=inside, other=0.0)
            pointers = weight + (K + rank).to(tl.int64)[:, None] * stride_w + tile * BLOCK_N + columns[None, :]
            branch = tl.load(pointers, mask=(rank < RANK)[:, None], other=0.0, eviction_policy="evict_first").to(DOT)
            # z as the sum of two narrow numbers: one alone would round it.
            high = rest.to(DOT)
            low = (rest - high.to(tl.float32)).to(DOT)
            total = tl.dot(low, branch, tl.dot(high, branch, total))
    column = first + columns
    places = tokens[:, None] * N + column[None, :]
    inside = (tokens < M)[:, None] & (column < end)[None, :]
    for s in tl.static_range(ADDENDS):
        total += tl.load(addend + s * M * N + places, mask=inside, other=0.0)
    if PARTIAL:
        out += tl.program_id(1) * M * N
    elif BIAS:
        total += tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce(partial, bias, y, M, N, BIAS: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """`y[m, n] = sum_s partial[s, m, n] + bias[n]`, always in the same order. Grid `(column blocks, M)`."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for s in tl.static_range(SLICES):
        total += tl.load(partial + (s * M + token) * N + column, mask=column < N, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + column, total.to(y.dtype.element_ty), mask=column < N)
