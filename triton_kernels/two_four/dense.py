"""Triton kernels that turn 2:4 weights back into dense ones: on chip for `tl.dot`, or into memory.

A group of four inputs is an int64 of four 16-bit floats here: its two kept weights shifted to their positions.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import low_half


@triton.jit
def spread(first, second, nibble):
    """A dense group (int64) of two 16-bit patterns (int64, upper bits zero) at the positions in `nibble`."""
    nibble = nibble.to(tl.int64)
    return (first << ((nibble & 3) << 4)) | (second << ((nibble & 12) << 2))


@triton.jit
def position(groups, PLACE: tl.constexpr, BF16: tl.constexpr, DOT: tl.constexpr):
    """Position `PLACE` of every dense group as numbers of type `DOT`: the 16-bit type of the values, or fp32."""
    half = (groups >> (16 * PLACE)).to(tl.int32)
    if DOT == tl.float32:  # noqa: SIM300
        return low_half(half, BF16)
    else:
        return half.to(tl.int16).to(DOT, bitcast=True)


@triton.jit
def dot_groups(acc, x_groups, groups, BF16: tl.constexpr, DOT: tl.constexpr):
    """`acc[m, n] + sum over groups q and positions of x_groups[m, q] * groups[q, n]`, dense groups on both sides.

    Four products of planes: nothing has to be interleaved.
    """
    for place in tl.static_range(4):
        x_plane = position(x_groups, place, BF16, DOT)
        acc = tl.dot(x_plane, position(groups, place, BF16, DOT), acc, input_precision="ieee")
    return acc


@triton.jit
def dot(
    fragments,
    metadata,
    x,
    bias,
    y,
    M,
    N,
    groups,
    tiles,
    octets,
    fragment_stride,
    metadata_stride,
    BLOCK_M: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= BLOCK_M; the weights are read once and expanded on chip.

    `fragments`, `x`: int64 views, as for `select`; a program owns ROW_TILES row tiles. `DOT`: type of the products.
    """
    e = tl.arange(0, 512 * ROW_TILES)
    tile, g, t, half = e // 64 % 8, e % 64 // 8, e % 8 // 2, e % 2
    # A program past the last row tile repeats it and stores nothing.
    tile_row = tl.minimum(tl.program_id(0) * ROW_TILES + e // 512, tl.cdiv(N, 16) - 1).to(tl.int64)
    fragments += tile_row * fragment_stride + e % 512
    metadata += tile_row * metadata_stride + g * 16 + (tile // 4 * 2 + half) * 4 + tile % 4
    m = tl.arange(0, BLOCK_M)[:, None]
    q = tl.arange(0, 64)[None, :]
    group = q // 8 * 8 + q % 8 // 2 + q % 2 * 4  # in the order of e
    upper = tl.zeros((BLOCK_M, 8 * ROW_TILES), tl.float32)
    lower = tl.zeros((BLOCK_M, 8 * ROW_TILES), tl.float32)
    for octet in range(octets):
        stored = octet * 8 + tile < tiles
        pair = tl.load(fragments + octet * 512, mask=stored, other=0, eviction_policy="evict_first")
        pattern = tl.load(metadata + octet * 128) >> (4 * t)
        x_groups = tl.load(
            x + m * groups + (octet * 64 + group),
            mask=(m < M) & (octet * 64 + group < groups),
            other=0,
            eviction_policy="evict_last",
        )
        top = spread(pair & 0xFFFF, (pair >> 16) & 0xFFFF, pattern & 15)
        bottom = spread((pair >> 32) & 0xFFFF, (pair >> 48) & 0xFFFF, (pattern >> 16) & 15)
        upper = dot_groups(upper, x_groups, _columns(top, ROW_TILES), BF16, DOT)
        lower = dot_groups(lower, x_groups, _columns(bottom, ROW_TILES), BF16, DOT)
    store_halves(upper, lower, y, bias, m, M, N, ROW_TILES)


@triton.jit
def store_halves(upper, lower, y, bias, m, M, N, ROW_TILES: tl.constexpr):
    """Store the sums `[m; row tile, g]` of rows g and g + 8 of this program's tiles of 16 rows, with the bias added."""
    o = tl.arange(0, 8 * ROW_TILES)[None, :]
    row = tl.program_id(0) * (16 * ROW_TILES) + o // 8 * 16 + o % 8
    if bias is not None:
        upper += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
        lower += tl.load(bias + row + 8, mask=row + 8 < N, other=0).to(tl.float32)
    tl.store(y + m * N + row, upper, mask=(m < M) & (row < N))
    tl.store(y + m * N + row + 8, lower, mask=(m < M) & (row + 8 < N))


@triton.jit
def _columns(groups, ROW_TILES: tl.constexpr):
    """Row tile, tile, g, t, half in one axis -> `[tile, t, half; row tile, g]`."""
    parts = tl.reshape(groups, (ROW_TILES, 8, 8, 8))
    return tl.reshape(tl.permute(parts, (1, 3, 0, 2)), (64, 8 * ROW_TILES))


@triton.jit
def expand(
    fragments,
    metadata,
    dense,
    N,
    groups,
    tiles,
    fragment_stride,
    metadata_stride,
    OCTETS: tl.constexpr,
):
    """Write the dense weight `[N, K]`; `fragments` and `dense` are int64 views, `groups` = K / 4.

    A program owns OCTETS octets of a row tile.
    """
    e = tl.arange(0, 64 * OCTETS)
    g, t, half = e % 64 // 8, e % 8 // 2, e % 2
    octet = tl.program_id(1) * OCTETS + e // 64
    tile_row = tl.program_id(0).to(tl.int64)
    fragment_at = fragments + tile_row * fragment_stride + (octet * 512 + e % 64)
    metadata_at = metadata + tile_row * metadata_stride + (octet * 128 + g * 16 + half * 4)
    row = tile_row * 16 + g
    for j in tl.static_range(8):
        stored = octet * 8 + j < tiles
        pair = tl.load(fragment_at + j * 64, mask=stored, other=0, eviction_policy="evict_first")
        pattern = tl.load(metadata_at + (j // 4 * 8 + j % 4), mask=stored, other=0) >> (4 * t)
        group = (octet * 8 + j) * 8 + t + 4 * half
        top = spread(pair & 0xFFFF, (pair >> 16) & 0xFFFF, pattern & 15)
        bottom = spread((pair >> 32) & 0xFFFF, (pair >> 48) & 0xFFFF, (pattern >> 16) & 15)
        tl.store(dense + row * groups + group, top, mask=(row < N) & (group < groups))
        tl.store(dense + (row + 8) * groups + group, bottom, mask=(row + 8 < N) & (group < groups))
