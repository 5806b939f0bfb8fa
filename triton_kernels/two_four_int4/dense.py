"""Triton kernels that turn 2:4 int4 weights back into dense ones: on chip for `tl.dot`, or into memory.

Both round `scale * (code - zero)` once to the 16-bit type of the activations. A group of four inputs is an int64 of
four such numbers, as in `two_four/dense.py`.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ..two_four.dense import dot_groups, spread, store_halves
from ..two_four.kernel import high_half, low_half


@triton.jit
def _pattern(value, BF16: tl.constexpr):
    """fp32 -> the bits of the nearest 16-bit float (ties to even), as int64. Finite values only."""
    if BF16:  # by integers: Triton's interpreter truncates
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int64) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def _group(word, scale, zero, nibble, REGISTER: tl.constexpr, BF16: tl.constexpr):
    """The dense group whose two codes are nibbles REGISTER and REGISTER + 4 of `word`."""
    first = ((word >> (4 * REGISTER)) & 15).to(tl.float32) - zero
    second = ((word >> (4 * REGISTER + 16)) & 15).to(tl.float32) - zero
    return spread(_pattern(first * scale, BF16), _pattern(second * scale, BF16), nibble & 15)


@triton.jit
def _groups(codes, metadata, scales, zeros, tile_row, octet, lane_block, e, blocks, strides, GROUP, BF16):
    """The four dense groups of a code word: upper rows left and right, lower rows left and right.

    Word `e % 128` of block `2 * octet + lane_block`; zero past the last block.
    """
    code_stride, metadata_stride, scale_stride = strides
    g, t, i = e % 128 // 16, e % 16 // 4, e % 4
    block = octet * 2 + lane_block
    stored = block < blocks
    tile_row = tile_row.to(tl.int64)
    word = tl.load(
        codes + tile_row * code_stride + (block * 128 + e % 128),
        mask=stored,
        other=0,
        eviction_policy="evict_first",
    )
    metadata += tile_row * metadata_stride + (octet * 128 + g * 16 + lane_block * 8 + i)
    left = tl.load(metadata, mask=stored, other=0) >> (4 * t)
    right = tl.load(metadata + 4, mask=stored, other=0) >> (4 * t)
    if GROUP == 0:
        scale_at = tile_row * scale_stride + g * 4
    else:
        group = block * (128 // GROUP) + i * 32 // GROUP
        scale_at = tile_row * scale_stride + (group // 4 * 32 + g * 4 + group % 4)
    scale = tl.load(scales + scale_at, mask=stored, other=0)
    if zeros is not None:
        pair = tl.load(zeros + scale_at, mask=stored, other=0).to(tl.int32)
    else:
        pair = tl.full(scale.shape, 0x88, tl.int32)
    scale_upper, scale_lower = low_half(scale, False), high_half(scale, False)
    zero_upper, zero_lower = (pair & 15).to(tl.float32), (pair >> 4).to(tl.float32)
    return (
        _group(word, scale_upper, zero_upper, left, 0, BF16),
        _group(word, scale_upper, zero_upper, right, 2, BF16),
        _group(word, scale_lower, zero_lower, left >> 16, 1, BF16),
        _group(word, scale_lower, zero_lower, right >> 16, 3, BF16),
    )


@triton.jit
def dot(
    codes,
    metadata,
    scales,
    zeros,
    x,
    bias,
    y,
    M,
    N,
    groups,
    blocks,
    octets,
    code_stride,
    metadata_stride,
    scale_stride,
    BLOCK_M: tl.constexpr,
    ROW_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= BLOCK_M; the weights are read once and expanded on chip.

    `x`: int64 view; a program owns ROW_TILES row tiles. `DOT`: type of the products.
    """
    e = tl.arange(0, 256 * ROW_TILES)
    # A program past the last row tile repeats it and stores nothing.
    tile_row = tl.minimum(tl.program_id(0) * ROW_TILES + e // 256, tl.cdiv(N, 16) - 1)
    m = tl.arange(0, BLOCK_M)[:, None]
    q = tl.arange(0, 32)[None, :]
    group = (q // 16 * 4 + q % 4) * 8 + q % 16 // 4  # block, t, tile of the block: the order of e
    upper = tl.zeros((BLOCK_M, 8 * ROW_TILES), tl.float32)
    lower = tl.zeros((BLOCK_M, 8 * ROW_TILES), tl.float32)
    strides = (code_stride, metadata_stride, scale_stride)
    for octet in range(octets):
        top_left, top_right, bottom_left, bottom_right = _groups(
            codes, metadata, scales, zeros, tile_row, octet, e // 128 % 2, e, blocks, strides, GROUP, BF16
        )
        at = octet * 64 + group
        x_at = x + m * groups + at
        x_left = tl.load(x_at, mask=(m < M) & (at < groups), other=0, eviction_policy="evict_last")
        x_right = tl.load(x_at + 4, mask=(m < M) & (at + 4 < groups), other=0, eviction_policy="evict_last")
        upper = dot_groups(upper, x_left, _columns(top_left, ROW_TILES), BF16, DOT)
        upper = dot_groups(upper, x_right, _columns(top_right, ROW_TILES), BF16, DOT)
        lower = dot_groups(lower, x_left, _columns(bottom_left, ROW_TILES), BF16, DOT)
        lower = dot_groups(lower, x_right, _columns(bottom_right, ROW_TILES), BF16, DOT)
    store_halves(upper, lower, y, bias, m, M, N, ROW_TILES)


@triton.jit
def _columns(groups, ROW_TILES: tl.constexpr):
    """Row tile, block, g, t, tile in one axis -> `[block, t, tile; row tile, g]`."""
    parts = tl.reshape(groups, (ROW_TILES, 2, 8, 16))
    return tl.reshape(tl.permute(parts, (1, 3, 0, 2)), (32, 8 * ROW_TILES))


@triton.jit
def expand(
    codes,
    metadata,
    scales,
    zeros,
    dense,
    N,
    groups,
    blocks,
    code_stride,
    metadata_stride,
    scale_stride,
    OCTETS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
):
    """Write the dense weight `[N, K]`; `dense` is an int64 view, `groups` = K / 4.

    A program owns OCTETS octets of a row tile.
    """
    e = tl.arange(0, 256 * OCTETS)
    octet, lane_block = tl.program_id(1) * OCTETS + e // 256, e // 128 % 2
    tile_row = tl.program_id(0)
    strides = (code_stride, metadata_stride, scale_stride)
    top_left, top_right, bottom_left, bottom_right = _groups(
        codes, metadata, scales, zeros, tile_row, octet, lane_block, e, blocks, strides, GROUP, BF16
    )
    group = octet * 64 + (lane_block * 4 + e % 4) * 8 + e % 16 // 4
    row = tile_row.to(tl.int64) * 16 + e % 128 // 16
    at = dense + row * groups + group
    tl.store(at, top_left, mask=(row < N) & (group < groups))
    tl.store(at + 4, top_right, mask=(row < N) & (group + 4 < groups))
    tl.store(at + 8 * groups, bottom_left, mask=(row + 8 < N) & (group < groups))
    tl.store(at + 8 * groups + 4, bottom_right, mask=(row + 8 < N) & (group + 4 < groups))
