"""Triton kernels for 2:4 weights in fragment order (`layout.py`).

`select` and `mma_sp` share their shape: warps split a row tile's columns, octet by octet, so that a matrix of 4096 rows
fills a large GPU; their sums meet once, after the loop, in a fixed order.

`TAIL` says how K ends: 0, in whole octets for every warp, so nothing is masked; 1, in a whole octet; 2, anywhere.
"""

# ruff: noqa: RUF005  (tuples are added, not unpacked: Triton's language is not Python)
from __future__ import annotations

import triton
import triton.language as tl


def _sparse_mma(kind: str, tile: int) -> str:
    """PTX of one warp-wide product, tile 0..7 of an octet: acc, then A, B, metadata, acc, four registers each."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, ${12 + tile % 4}, {tile // 4};"
    )


F16_MMA: tl.constexpr = tl.constexpr(tuple(_sparse_mma("f16", tile) for tile in range(8)))
BF16_MMA: tl.constexpr = tl.constexpr(tuple(_sparse_mma("bf16", tile) for tile in range(8)))
MMA_REGISTERS: tl.constexpr = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")


@triton.jit
def low_half(word, BF16: tl.constexpr):
    """The 16-bit float in the low half of an int32, as fp32.

    Bits only: arithmetic on bf16 is not to be trusted here.
    """
    if BF16:
        return (word << 16).to(tl.float32, bitcast=True)
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word, BF16: tl.constexpr):
    """The 16-bit float in the high half of an int32, as fp32."""
    if BF16:
        return (word & -65536).to(tl.float32, bitcast=True)
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pick(four, shift, BF16: tl.constexpr):
    """One of the four 16-bit floats of an int64; `shift` is 16 times its position."""
    return low_half((four >> shift.to(tl.int64)).to(tl.int32), BF16)


@triton.jit
def select(
    fragments,
    metadata,
    x,
    bias,
    y,
    N,
    groups,
    tiles,
    trips,
    fragment_stride,
    metadata_stride,
    M: tl.constexpr,
    WARPS: tl.constexpr,
    BF16: tl.constexpr,
    TAIL: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= 8. Every lane picks the inputs of its kept weights out of four by shifting.

    `fragments`, `x`: int64 views; an int64 of fragments is one group in rows g and g + 8, one of x four inputs.
    `groups` = K / 4; `tiles`: column tiles stored; `trips`: octets per warp; strides of a row tile, in elements.
    """
    e = tl.arange(0, 64 * WARPS)
    warp, g, t, half = e // 64, e % 64 // 8, e % 8 // 2, e % 2
    tile_row = tl.program_id(0)
    fragments += tile_row.to(tl.int64) * fragment_stride
    metadata += tile_row.to(tl.int64) * metadata_stride
    upper, lower = (), ()
    for _ in tl.static_range(M):
        upper += (tl.zeros((64 * WARPS,), tl.float32),)
        lower += (tl.zeros((64 * WARPS,), tl.float32),)
    for step in range(2 * trips):
        tile = (step // 2 * WARPS + warp) * 8 + step % 2 * 4
        # Pointers start from scalars in every step: tensors of pointers carried through the loop would change layout.
        fragment_at = fragments + (step // 2 * (512 * WARPS) + step % 2 * 256) + (warp * 512 + e % 64)
        metadata_at = metadata + (step // 2 * (128 * WARPS) + step % 2 * 8) + (warp * 128 + g * 16 + half * 4)
        x_at = x + (step // 2 * (64 * WARPS) + step % 2 * 32) + (warp * 64 + t + 4 * half)
        pairs = ()
        for j in tl.static_range(4):
            if TAIL == 0:
                pairs += (tl.load(fragment_at + j * 64, eviction_policy="evict_first"),)
            else:
                stored = tile + (j if TAIL == 2 else 0) < tiles
                pairs += (tl.load(fragment_at + j * 64, mask=stored, other=0, eviction_policy="evict_first"),)
        for j in tl.static_range(4):
            if TAIL == 0:
                pattern = tl.load(metadata_at + j)
            else:
                pattern = tl.load(metadata_at + j, mask=tile < tiles, other=0)
            pattern = pattern >> (4 * t)
            first, second = pairs[j].to(tl.int32), (pairs[j] >> 32).to(tl.int32)
            for m in tl.static_range(M):
                at = x_at + m * groups + j * 8
                if TAIL == 0:
                    four = tl.load(at, eviction_policy="evict_last")
                elif TAIL == 1:
                    four = tl.load(at, mask=tile < tiles, other=0, eviction_policy="evict_last")
                else:
                    inside = (tile + j) * 8 + t + 4 * half < groups
                    four = tl.load(at, mask=inside, other=0, eviction_policy="evict_last")
                top = upper[m] + low_half(first, BF16) * pick(four, (pattern << 4) & 48, BF16)
                top += high_half(first, BF16) * pick(four, (pattern << 2) & 48, BF16)
                bottom = lower[m] + low_half(second, BF16) * pick(four, (pattern >> 12) & 48, BF16)
                bottom += high_half(second, BF16) * pick(four, (pattern >> 14) & 48, BF16)
                upper = upper[:m] + (top,) + upper[m + 1 :]
                lower = lower[:m] + (bottom,) + lower[m + 1 :]
    row = tile_row * 16 + tl.arange(0, 8)
    for m in tl.static_range(M):
        top = tl.sum(tl.sum(tl.reshape(upper[m], (WARPS, 8, 8)), 2), 0)
        bottom = tl.sum(tl.sum(tl.reshape(lower[m], (WARPS, 8, 8)), 2), 0)
        if bias is not None:
            top += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
            bottom += tl.load(bias + row + 8, mask=row + 8 < N, other=0).to(tl.float32)
        tl.store(y + m * N + row, top, mask=row < N)
        tl.store(y + m * N + row + 8, bottom, mask=row + 8 < N)


@triton.jit
def _octet(fragments, metadata, trip, tiles, SPLIT: tl.constexpr, WARPS: tl.constexpr, TAIL: tl.constexpr):
    """A trip's eight A fragments and their metadata; nothing is read past the last tile, where `TAIL` needs zeros."""
    e = tl.arange(0, 128 * WARPS)
    warp = e // 128 % SPLIT
    tile = (trip * SPLIT + warp) * 8
    fragment_at = fragments + trip * (1024 * SPLIT) + (warp * 1024 + e % 128)
    metadata_at = metadata + trip * (128 * SPLIT) + (warp * 128 + e % 128)
    a = ()
    if TAIL == 0:
        # Only the load that runs ahead of the last trip is masked, and what it gives is not used.
        pattern = tl.load(metadata_at, mask=tile < tiles, eviction_policy="evict_first")
    else:
        pattern = tl.load(metadata_at, mask=tile < tiles, other=0x44444444, eviction_policy="evict_first")
    for j in tl.static_range(8):
        at = fragment_at + j * 128
        if TAIL == 0:
            a += (tl.load(at, mask=tile < tiles, eviction_policy="evict_first"),)
        else:
            stored = tile + (j if TAIL == 2 else 0) < tiles
            a += (tl.load(at, mask=stored, other=0, eviction_policy="evict_first"),)
    return a, pattern


@triton.jit
def mma_sp(
    fragments,
    metadata,
    x,
    bias,
    y,
    M,
    N,
    words,
    tiles,
    trips,
    fragment_stride,
    metadata_stride,
    TOKEN_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    BF16: tl.constexpr,
    TAIL: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= 8 TOKEN_TILES, by sparse tensor cores; every weight is read once.

    `SPLIT` warps share a row tile; a program owns WARPS / SPLIT row tiles. `fragments`, `x`: int32 views; `words` = K /
    2. The compiler must give these one-dimensional tiles four consecutive elements per lane: then an int32 of
    `fragments` is register e % 4 of lane e % 128 // 4 (`aot.misplaced_fragments` checks it).
    """
    e = tl.arange(0, 128 * WARPS)
    warp, g, t, r = e // 128 % SPLIT, e % 128 // 16, e % 16 // 4, e % 4
    ROW_TILES: tl.constexpr = WARPS // SPLIT
    first_row_tile = tl.program_id(0) * ROW_TILES
    fragments += first_row_tile.to(tl.int64) * fragment_stride
    metadata += first_row_tile.to(tl.int64) * metadata_stride
    if ROW_TILES > 1:
        # A program past the last row tile repeats it and stores nothing.
        ahead = tl.minimum(e // (128 * SPLIT), tl.cdiv(N, 16) - 1 - first_row_tile)
        fragments += ahead * fragment_stride
        metadata += ahead * metadata_stride
    accs, x_offset = (), ()
    for i in tl.static_range(TOKEN_TILES):
        accs += (tl.zeros((128 * WARPS,), tl.float32),)
        # Columns past the last token repeat it: they are not stored, and this needs no mask.
        x_offset += (tl.minimum(g + 8 * i, M - 1) * words + (warp * 128 + t + 4 * r),)
    a, pattern = _octet(fragments, metadata, 0, tiles, SPLIT, WARPS, TAIL)
    for trip in range(trips):
        # The next octet is under way while this one is multiplied: a warp has to keep kilobytes in flight.
        next_a, next_pattern = _octet(fragments, metadata, trip + 1, tiles, SPLIT, WARPS, TAIL)
        tile = (trip * SPLIT + warp) * 8
        for i in tl.static_range(TOKEN_TILES):
            x_at = x + trip * (128 * SPLIT) + x_offset[i]
            for j in tl.static_range(8):
                if TAIL == 0:
                    b = tl.load(x_at + j * 16, eviction_policy="evict_last")
                elif TAIL == 1:
                    b = tl.load(x_at + j * 16, mask=tile < tiles, other=0, eviction_policy="evict_last")
                else:
                    inside = (tile + j) * 16 + t + 4 * r < words
                    b = tl.load(x_at + j * 16, mask=inside, other=0, eviction_policy="evict_last")
                acc = tl.inline_asm_elementwise(
                    BF16_MMA[j] if BF16 else F16_MMA[j],
                    MMA_REGISTERS,
                    [a[j], b, pattern, accs[i]],
                    dtype=tl.float32,
                    is_pure=True,
                    pack=4,
                )
                accs = accs[:i] + (acc,) + accs[i + 1 :]
        a, pattern = next_a, next_pattern
    o = tl.arange(0, 128 * ROW_TILES)
    row = first_row_tile * 16 + o // 128 * 16 + o % 128 // 16 + o % 4 // 2 * 8
    for i in tl.static_range(TOKEN_TILES):
        token = 8 * i + o % 16 // 4 * 2 + o % 2
        result = tl.reshape(tl.sum(tl.reshape(accs[i], (ROW_TILES, SPLIT, 128)), 1), (128 * ROW_TILES,))
        if bias is not None:
            result += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
        tl.store(y + token * N + row, result, mask=(token < M) & (row < N))
