"""Triton kernels of input-selected linears with int4 weights, input-major, dense or in kept groups (`layout.py`).

`pick` comes first: for every part and chunk of K it lists the inputs that any token selects, and each token's masked
values in that order. The products then walk dense lists, so that neither bytes nor instructions go to skipped inputs.

A program of `gemv` or `dot` owns a column tile of up to 128 columns, in sections of WORDS words of 8 codes, and one
chunk of K; SHARE sections make a group. Kept groups need no scatter: lanes own sections of the tile, and find out from
a row's entry word whether, and where, theirs is stored.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..input_select.kernel import _selected


@triton.jit
def pick(
    x,
    thresholds,
    norms,
    rows,
    values,
    counts,
    M,
    K,
    stride_x,
    stride_t,
    NORMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid `(chunks, parts)`. `rows[part, chunk, CHUNK]`, `counts[part, chunk]`, `values[part, chunk, token, CHUNK]`.
    Thresholds of tokens are `stride_t` apart; 0 where all have the same.

    Lists are in ascending order; what lies behind their end is left as it was.
    """
    part = tl.program_id(1)
    place = part * tl.num_programs(0) + tl.program_id(0)
    thresholds += part
    norms += part * K
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = row < K
    union = tl.zeros((CHUNK,), tl.int32)
    for m in range(0, M):
        threshold = tl.load(thresholds + m * stride_t)
        value = tl.load(x + m * stride_x + row, mask=inside, other=0.0).to(tl.float32)
        union |= _selected(value, norms, row, inside, threshold, NORMS, False).to(tl.int32)
    position = tl.cumsum(union, 0) - 1
    chosen = union > 0
    tl.store(rows + place * CHUNK + position, row, mask=chosen)
    tl.store(counts + place, tl.sum(union, 0))
    for m in range(0, M):
        threshold = tl.load(thresholds + m * stride_t)
        value = tl.load(x + m * stride_x + row, mask=inside, other=0.0)
        used = _selected(value.to(tl.float32), norms, row, inside, threshold, NORMS, False)
        tl.store(values + (place * M + m) * CHUNK + position, tl.where(used, value, 0.0), mask=chosen)


@triton.jit
def _places(
    entries, row, inside, tile, K, kept, section, SECTIONS: tl.constexpr, SHARE: tl.constexpr, SPARSE: tl.constexpr
):
    """Entry number of each of the tile's sections in each row `[BLOCK_K, SECTIONS]`, and whether it is stored."""
    group = section // SHARE
    start = row * kept
    if not SPARSE:
        return start[:, None] + (tile * (SECTIONS // SHARE) + group), inside[:, None] & (group >= 0)
    word = tl.load(entries + tile * K + row, mask=inside, other=0)[:, None]
    # Bits 0-7: stored groups. How many are stored before groups 2, 4 and 6: bits 8-9, 10-12, 13-15. Above: the first.
    pair = group // 2
    counted = (word >> tl.where(pair == 1, 8, tl.where(pair == 2, 10, 13))) & tl.where(pair == 1, 3, 7)
    before = tl.where(pair == 0, 0, counted) + tl.where(group % 2 == 1, (word >> (pair * 2)) & 1, 0)
    return start[:, None] + ((word >> 16) & 0xFFFF) + before, ((word >> group) & 1) > 0


@triton.jit
def _scales(scales, zeros, place, stored, one, ASYMMETRIC: tl.constexpr):
    """fp32 scale (0 where nothing is stored) of entries, and their zero point z as 1 + z/16, as `_code` makes codes."""
    scale = tl.load(scales + place, mask=stored, other=0.0).to(tl.float32)
    if ASYMMETRIC:
        pair = tl.load(zeros + (place >> 1), mask=stored, other=0).to(tl.int32)
        return scale, (((pair << (19 - (place & 1) * 4)) & 0x00780000) | one).to(tl.float32, bitcast=True)
    return scale, tl.full(scale.shape, 1.5, tl.float32)


@triton.jit
def _code(words, j: tl.constexpr, one):
    """The j-th code q of each word, as the float 1 + q/16. `one`: the bits of 1.0, loaded: an instruction takes one
    constant, and the mask is that; the compiler would split the operation if it knew this number too.
    """
    if 4 * j > 19:
        bits = words >> (4 * j - 19)
    else:
        bits = words << (19 - 4 * j)
    return ((bits & 0x00780000) | one).to(tl.float32, bitcast=True)


@triton.jit
def gemv(
    codes,
    scales,
    zeros,
    entries,
    rows,
    values,
    counts,
    tiles,
    out,
    N,
    K,
    kept,
    PARTS: tl.constexpr,
    SPARSE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    SECTIONS: tl.constexpr,
    SHARE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token. Grid `(tiles, chunks)`; fp32 sums go to `out[chunk, column]`. `kept`: entries of a row.

    Codes and zero points q become floats 1 + q/16 by bit operations alone, whose difference is a sixteenth of theirs.
    """
    tile = tl.program_id(0)
    part = 0
    first = tile * (SECTIONS * WORDS * 8)
    end = N
    if PARTS > 1:
        part = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
    place = part * tl.num_programs(1) + tl.program_id(1)
    count = tl.load(counts + place)
    rows += place * CHUNK
    values += place * CHUNK
    lanes = tl.arange(0, BLOCK_K)
    section = tl.arange(0, SECTIONS)[None, :]
    word = tl.arange(0, WORDS)[None, None, :]
    sums = (tl.zeros((BLOCK_K, SECTIONS, WORDS), tl.float32),) * 8
    one = tl.load(tiles + 3)
    # A sum, so that the compiler keeps it where the lanes that load a row's codes are.
    offset = tl.sum(sums[0], 2)
    for i in range(0, count, BLOCK_K * UNROLL):
        loaded = ()
        factors = ()
        for u in tl.static_range(UNROLL):
            at = i + u * BLOCK_K + lanes
            inside = at < count
            row = tl.load(rows + at, mask=inside, other=0)
            value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
            entry, stored = _places(entries, row, inside, tile, K, kept, section, SECTIONS, SHARE, SPARSE)
            pointers = codes + (entry * SHARE + section % SHARE)[:, :, None] * WORDS + word
            loaded += (tl.load(pointers, mask=stored[:, :, None], other=0, eviction_policy="evict_first"),)
            scale, zero = _scales(scales, zeros, entry, stored, one, ASYMMETRIC)
            factor = scale * value[:, None]
            offset += factor * zero
            factors += (factor,)
        for u in tl.static_range(UNROLL):
            added = ()
            for j in tl.static_range(8):
                added += (sums[j] + _code(loaded[u], j, one) * factors[u][:, :, None],)
            sums = added
    out += tl.program_id(1) * N
    taken_off = tl.sum(offset, 0)
    column = first + (tl.arange(0, SECTIONS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]) * 8
    for j in tl.static_range(8):
        result = 16.0 * (tl.sum(sums[j], 0) - taken_off[:, None])
        tl.store(out + column + j, result, mask=column + j < end)


@triton.jit
def dot(
    codes,
    scales,
    zeros,
    entries,
    rows,
    values,
    counts,
    tiles,
    out,
    M,
    N,
    K,
    kept,
    PARTS: tl.constexpr,
    SPARSE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    SECTIONS: tl.constexpr,
    SHARE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Up to BLOCK_M tokens by tensor cores, in type DOT. The j-th codes of all words make a matrix of their own, so
    that nothing has to change places between memory and the product.
    """
    tile = tl.program_id(0)
    part = 0
    first = tile * (SECTIONS * WORDS * 8)
    end = N
    if PARTS > 1:
        part = tl.load(tiles + 4 * tile)
        first = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
    place = part * tl.num_programs(1) + tl.program_id(1)
    count = tl.load(counts + place)
    rows += place * CHUNK
    token = tl.arange(0, BLOCK_M)[:, None]
    values += (place * M + token) * CHUNK
    lanes = tl.arange(0, BLOCK_K)
    section = tl.arange(0, SECTIONS)[None, :]
    word = tl.arange(0, WORDS)[None, None, :]
    one = tl.load(tiles + 3)
    sums = (tl.zeros((BLOCK_M, SECTIONS * WORDS), tl.float32),) * 8
    for i in range(0, count, BLOCK_K):
        at = i + lanes
        inside = at < count
        row = tl.load(rows + at, mask=inside, other=0)
        value = tl.load(values + at[None, :], mask=inside[None, :] & (token < M), other=0.0).to(DOT)
        entry, stored = _places(entries, row, inside, tile, K, kept, section, SECTIONS, SHARE, SPARSE)
        pointers = codes + (entry * SHARE + section % SHARE)[:, :, None] * WORDS + word
        loaded = tl.load(pointers, mask=stored[:, :, None], other=0, eviction_policy="evict_first")
        scale, zero = _scales(scales, zeros, entry, stored, one, ASYMMETRIC)
        scale = (scale * 16.0)[:, :, None]
        offset = scale * zero[:, :, None]
        added = ()
        for j in tl.static_range(8):
            weight = (_code(loaded, j, one) * scale - offset).to(DOT)  # exact before the conversion
            added += (tl.dot(value, tl.reshape(weight, (BLOCK_K, SECTIONS * WORDS)), sums[j]),)
        sums = added
    column = first + tl.arange(0, SECTIONS * WORDS)[None, :] * 8
    out += (tl.program_id(1) * M + token) * N
    for j in tl.static_range(8):
        tl.store(out + column + j, sums[j], mask=(token < M) & (column + j < end))


@triton.jit
def expand(
    codes,
    scales,
    zeros,
    entries,
    tiles,
    weight,
    N,
    K,
    kept,
    PARTS: tl.constexpr,
    SPARSE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    SECTIONS: tl.constexpr,
    SHARE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write W^T to `weight[K, N]`, rounded once to its dtype. Grid `(tiles, blocks of K)`."""
    tile = tl.program_id(0)
    first = tile * (SECTIONS * WORDS * 8)
    end = N
    if PARTS > 1:
        first = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
    one = tl.load(tiles + 3)
    section = tl.arange(0, SECTIONS)[None, :]
    word = tl.arange(0, WORDS)[None, None, :]
    row = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < K
    entry, stored = _places(entries, row, inside, tile, K, kept, section, SECTIONS, SHARE, SPARSE)
    pointers = codes + (entry * SHARE + section % SHARE)[:, :, None] * WORDS + word
    loaded = tl.load(pointers, mask=stored[:, :, None], other=0, eviction_policy="evict_first")
    scale, zero = _scales(scales, zeros, entry, stored, one, ASYMMETRIC)
    scale = (scale * 16.0)[:, :, None]
    offset = scale * zero[:, :, None]
    # Joined last, a half of the codes differs in the lowest bit of its place: codes 0 to 7 come to lie in a row.
    even = tl.join(
        tl.join(_code(loaded, 0, one), _code(loaded, 4, one)), tl.join(_code(loaded, 2, one), _code(loaded, 6, one))
    )
    odd = tl.join(
        tl.join(_code(loaded, 1, one), _code(loaded, 5, one)), tl.join(_code(loaded, 3, one), _code(loaded, 7, one))
    )
    eight = tl.reshape(tl.join(even, odd), (BLOCK_K, SECTIONS, WORDS, 8))
    values = eight * scale[:, :, :, None] - offset[:, :, :, None]
    column = first + ((section[:, :, None] * WORDS + word) * 8)[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
    target = weight + row.to(tl.int64)[:, None, None, None] * N + column
    kept_columns = inside[:, None, None, None] & (column < end)
    tl.store(target, values.to(weight.dtype.element_ty), mask=kept_columns)
