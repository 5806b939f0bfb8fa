"""Triton kernels for 2:4 weights with int4 values (`layout.py`).

As in `two_four/kernel.py`, warps split a row tile's columns and meet once after the loop. A trip is a span of four
blocks, 512 columns. Codes become floats by writing them into the mantissa of a power of two and subtracting that power
plus the zero point, which is exact; a group's sum is scaled in fp32.
"""

# ruff: noqa: RUF005  (tuples are added, not unpacked: Triton's language is not Python)
from __future__ import annotations

import triton
import triton.language as tl

from ..int4.fragment import rescale, zero_constants
from ..two_four.kernel import BF16_MMA, F16_MMA, MMA_REGISTERS, high_half, low_half, pick


def _decode(bf16: bool, registers: tuple[int, int, int, int]) -> str:
    """PTX: four code words (16-19) -> A fragments of their tiles (0-15), 16-bit floats `code - zero`.

    20-23 and 24-27 hold, for the four groups of a quad, the constants of `zero_constants` for rows g and g + 8; word i
    is in group `registers[i]`.
    """
    lines = [".reg .b32 t, s; mov.b32 s, %s;" % ("0x3f803f80" if bf16 else "0x2c002c00")]
    for i, register in enumerate(registers):
        word, upper, lower = f"${16 + i}", f"${20 + register}", f"${24 + register}"
        a = [f"${4 * i + r}" for r in range(4)]
        if bf16:
            for r in range(4):
                source = "t" if r else word
                lines += [f"shr.b32 t, {word}, {4 * r};"] if r else []
                lines.append(f"lop3.b32 {a[r]}, {source}, 0x000f000f, 0x43004300, 0xea;")
                lines.append(f"fma.rn.bf16x2 {a[r]}, {a[r]}, s, {lower if r % 2 else upper};")
            continue
        lines.append(f"shr.b32 t, {word}, 8;")
        for r in range(4):  # an odd nibble stays four bits higher: the product with 1/16 costs nothing
            mask = "0x00f000f0" if r % 2 else "0x000f000f"
            lines.append(f"lop3.b32 {a[r]}, {'t' if r > 1 else word}, {mask}, 0x64006400, 0xea;")
        for r in (0, 2):
            lines.append(f"add.rn.f16x2 {a[r]}, {a[r]}, {upper};")
            lines.append(f"fma.rn.f16x2 {a[r + 1]}, {a[r + 1]}, s, {lower};")
    return "{ " + " ".join(lines) + " }"


# Groups of a block's four tiles, as registers of their quad: one group for all (4 choices), two (2 choices), or four.
_PLACES = ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (0, 0, 1, 1), (2, 2, 3, 3), (0, 1, 2, 3))
F16_DECODE: tl.constexpr = tl.constexpr(tuple(_decode(False, place) for place in _PLACES))
BF16_DECODE: tl.constexpr = tl.constexpr(tuple(_decode(True, place) for place in _PLACES))
DECODE_REGISTERS: tl.constexpr = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 12))


@triton.jit
def _fragments(words, upper, lower, BLOCK: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr):
    """A fragments of the four tiles of block 0..3 of a span; `upper`, `lower` as for `_decode`."""
    if GROUP == 128:
        PLACE: tl.constexpr = BLOCK
    elif GROUP == 64:
        PLACE: tl.constexpr = 4 + BLOCK % 2
    elif GROUP == 32:
        PLACE: tl.constexpr = 6
    else:
        PLACE: tl.constexpr = 0
    return tl.inline_asm_elementwise(
        BF16_DECODE[PLACE] if BF16 else F16_DECODE[PLACE],
        DECODE_REGISTERS,
        [words, upper, lower],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _span(
    codes,
    metadata,
    trip,
    ahead,
    code_stride,
    metadata_stride,
    blocks,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A trip's four code words per lane and two registers of metadata; nothing is read past the last block."""
    e = tl.arange(0, 128 * WARPS)
    warp = e // 128 % SPLIT
    block = (trip * SPLIT + warp) * 4
    code_at = codes + trip * (512 * SPLIT) + (ahead * code_stride + warp * 512 + e % 128)
    metadata_at = metadata + trip * (256 * SPLIT) + (ahead * metadata_stride + warp * 256 + e % 128)
    a, patterns = (), ()
    for j in tl.static_range(4):
        # When even, only the load that runs ahead of the last trip is masked, and what it gives is not used.
        if EVEN:
            a += (tl.load(code_at + j * 128, mask=block < blocks, eviction_policy="evict_first"),)
        else:
            a += (tl.load(code_at + j * 128, mask=block + j < blocks, other=0, eviction_policy="evict_first"),)
        if j % 2 == 0:
            at = metadata_at + j * 64
            if EVEN:
                patterns += (tl.load(at, mask=block < blocks, eviction_policy="evict_first"),)
            else:
                stored = block + j < blocks
                patterns += (tl.load(at, mask=stored, other=0x44444444, eviction_policy="evict_first"),)
    return a, patterns


@triton.jit
def mma_sp(
    codes,
    metadata,
    scales,
    zeros,
    x,
    bias,
    y,
    M,
    N,
    words,
    blocks,
    quads,
    trips,
    code_stride,
    metadata_stride,
    scale_stride,
    TOKEN_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= 8 TOKEN_TILES, by sparse tensor cores; every weight is read once.

    `SPLIT` warps share a row tile; a program owns WARPS / SPLIT row tiles. `x`: int32 view; `words` = K / 2;
    `scale_stride` is that of `zeros` too, in elements of a row tile. `EVEN`: the columns are whole spans for every
    warp, nothing is masked.
    """
    e = tl.arange(0, 128 * WARPS)
    warp, g, t, r = e // 128 % SPLIT, e % 128 // 16, e % 16 // 4, e % 4
    ROW_TILES: tl.constexpr = WARPS // SPLIT
    QUADS: tl.constexpr = 128 // GROUP if GROUP else 1
    first_row_tile = tl.program_id(0) * ROW_TILES
    # A program past the last row tile repeats it and stores nothing.
    ahead = tl.minimum(e // (128 * SPLIT), tl.cdiv(N, 16) - 1 - first_row_tile) if ROW_TILES > 1 else 0
    codes += first_row_tile.to(tl.int64) * code_stride
    metadata += first_row_tile.to(tl.int64) * metadata_stride
    scales += first_row_tile.to(tl.int64) * scale_stride
    if zeros is not None:
        zeros += first_row_tile.to(tl.int64) * scale_stride
    totals, x_offset = (), ()
    for i in tl.static_range(TOKEN_TILES):
        totals += (tl.zeros((128 * WARPS,), tl.float32),)
        # Columns past the last token repeat it: they are not stored, and this needs no mask.
        x_offset += (tl.minimum(g + 8 * i, M - 1) * words + (warp * 256 + t + 4 * r),)
    sums = totals
    middle = tl.full((128 * WARPS,), 8, tl.int32)
    upper, lower = zero_constants(middle, middle, 4, BF16)
    if GROUP == 0:
        row_at = tl.max_contiguous(tl.multiple_of(ahead * scale_stride + g * 4 + r, 4), 4)
        scale = tl.load(scales + row_at)
        if zeros is not None:
            upper, lower = _zero_constants(tl.load(zeros + row_at), BF16)
    a, patterns = _span(codes, metadata, 0, ahead, code_stride, metadata_stride, blocks, SPLIT, WARPS, EVEN)
    for trip in range(trips):
        span = trip * SPLIT + warp
        # The next span is under way while this one is multiplied: a warp has to keep kilobytes in flight.
        next_a, next_patterns = _span(
            codes, metadata, trip + 1, ahead, code_stride, metadata_stride, blocks, SPLIT, WARPS, EVEN
        )
        scale_at = trip * (32 * QUADS * SPLIT) + (ahead * scale_stride + warp * (32 * QUADS) + g * 4 + r)
        scale_at = tl.max_contiguous(tl.multiple_of(scale_at, 4), 4)
        for block in tl.static_range(4):
            if GROUP != 0 and block % (4 // QUADS) == 0:
                # What the compiler does not find out: four consecutive offsets are one aligned vector.
                at = tl.max_contiguous(tl.multiple_of(scale_at + block // (4 // QUADS) * 32, 4), 4)
                if EVEN:
                    scale = tl.load(scales + at, eviction_policy="evict_first")
                    if zeros is not None:
                        upper, lower = _zero_constants(tl.load(zeros + at), BF16)
                else:
                    stored = span * QUADS + block // (4 // QUADS) < quads
                    scale = tl.load(scales + at, mask=stored, other=0, eviction_policy="evict_first")
                    if zeros is not None:
                        pairs = tl.load(zeros + at, mask=stored, other=0)
                        upper, lower = _zero_constants(pairs, BF16)
            fragments = _fragments(a[block], upper, lower, block, GROUP, BF16)
            for i in tl.static_range(4):
                if GROUP != 0 and (block * 4 + i) * 32 % GROUP == 0:
                    sums = ()
                    for _ in tl.static_range(TOKEN_TILES):
                        sums += (tl.zeros((128 * WARPS,), tl.float32),)
                for m in tl.static_range(TOKEN_TILES):
                    at = x + trip * (256 * SPLIT) + x_offset[m] + (block * 4 + i) * 16
                    if EVEN:
                        b = tl.load(at, eviction_policy="evict_last")
                    else:
                        inside = span * 256 + (block * 4 + i) * 16 + t + 4 * r < words
                        b = tl.load(at, mask=inside, other=0, eviction_policy="evict_last")
                    result = tl.inline_asm_elementwise(
                        BF16_MMA[block % 2 * 4 + i] if BF16 else F16_MMA[block % 2 * 4 + i],
                        MMA_REGISTERS,
                        [fragments[i], b, patterns[block // 2], sums[m]],
                        dtype=tl.float32,
                        is_pure=True,
                        pack=4,
                    )
                    sums = sums[:m] + (result,) + sums[m + 1 :]
                    if GROUP != 0 and (block * 4 + i + 1) * 32 % GROUP == 0:
                        total = rescale(scale, result, totals[m], (block * 4 + i) * 32 // GROUP % 4)
                        totals = totals[:m] + (total,) + totals[m + 1 :]
        a, patterns = next_a, next_patterns
    o = tl.arange(0, 128 * ROW_TILES)
    row = first_row_tile * 16 + o // 128 * 16 + o % 128 // 16 + o % 4 // 2 * 8
    for m in tl.static_range(TOKEN_TILES):
        token = 8 * m + o % 16 // 4 * 2 + o % 2
        total = rescale(scale, sums[m], totals[m], 0) if GROUP == 0 else totals[m]
        result = tl.reshape(tl.sum(tl.reshape(total, (ROW_TILES, SPLIT, 128)), 1), (128 * ROW_TILES,))
        if bias is not None:
            result += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
        tl.store(y + token * N + row, result, mask=(token < M) & (row < N))


@triton.jit
def _zero_constants(pairs, BF16: tl.constexpr):
    """Zero points of rows g (low nibble) and g + 8 (high) -> constants for `_decode`."""
    pairs = pairs.to(tl.int32)
    return zero_constants(pairs & 15, pairs >> 4, 4, BF16)


@triton.jit
def _centered(word, zero, magic, NIBBLE: tl.constexpr):
    """`code - zero` of one nibble, exact: the code in the mantissa of 2^(23 - 4 NIBBLE), where it lies already.

    `magic`: 0x4B000000, the bits of 2^23, as a value the compiler does not know: masking and setting bits is then one
    instruction, which takes one constant from the code and one from a register.
    """
    if NIBBLE > 4:  # would reach into the exponent
        return _centered(word >> 12, zero, magic, NIBBLE - 3)
    else:
        bits = word & (15 << (4 * NIBBLE)) | (magic - (NIBBLE << 25))
        return bits.to(tl.float32, bitcast=True) - (zero + (1 << (23 - 4 * NIBBLE)) * 1.0)


@triton.jit
def select(
    codes,
    metadata,
    scales,
    zeros,
    x,
    bias,
    y,
    N,
    groups,
    blocks,
    trips,
    code_stride,
    metadata_stride,
    scale_stride,
    magic,
    M: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y[M, N] = x[M, K] W^T + bias`, M <= 8. Every lane picks the inputs of its kept weights out of four by shifting.

    `x`: int64 view, four inputs each; `groups` = K / 4; `trips`: octets per warp, in steps of BLOCKS blocks (1 or 2);
    `magic` as for `_centered`. The rest as in `mma_sp`.
    """
    e = tl.arange(0, 128 * WARPS)
    warp, g, t, i = e // 128, e % 128 // 16, e % 16 // 4, e % 4
    tile_row = tl.program_id(0)
    codes += tile_row.to(tl.int64) * code_stride
    metadata += tile_row.to(tl.int64) * metadata_stride
    scales += tile_row.to(tl.int64) * scale_stride
    if zeros is not None:
        zeros += tile_row.to(tl.int64) * scale_stride
    uppers, lowers = (), ()
    for _ in tl.static_range(M):
        uppers += (tl.zeros((128 * WARPS,), tl.float32),)
        lowers += (tl.zeros((128 * WARPS,), tl.float32),)
    for step in range(trips * (2 // BLOCKS)):
        trip, first = step // (2 // BLOCKS), step % (2 // BLOCKS)
        octet = trip * WARPS + warp
        code_at = codes + (trip * (256 * WARPS) + first * 128) + (warp * 256 + e % 128)
        # What the compiler does not find out: four consecutive offsets are one aligned vector.
        lane_at = tl.max_contiguous(tl.multiple_of(warp * 128 + g * 16 + i, 4), 4)
        metadata_at = metadata + (trip * (128 * WARPS) + first * 8) + lane_at
        x_at = x + (trip * (64 * WARPS) + first * 32) + (warp * 64 + i * 8 + t)
        words = ()
        for block in tl.static_range(BLOCKS):
            if EVEN:
                words += (tl.load(code_at + block * 128, eviction_policy="evict_first"),)
            else:
                stored = octet * 2 + first + block < blocks
                words += (tl.load(code_at + block * 128, mask=stored, other=0, eviction_policy="evict_first"),)
        for block in tl.static_range(BLOCKS):
            if GROUP == 0:
                scale_at = g * 4
            else:
                group = (octet * 2 + first + block) * (128 // GROUP) + i * 32 // GROUP
                scale_at = group // 4 * 32 + g * 4 + group % 4
            if EVEN:
                left = tl.load(metadata_at + block * 8) >> (4 * t)
                right = tl.load(metadata_at + (block * 8 + 4)) >> (4 * t)
                scale = tl.load(scales + scale_at)
                pair = tl.load(zeros + scale_at) if zeros is not None else 0
            else:
                stored = octet * 2 + first + block < blocks
                left = tl.load(metadata_at + block * 8, mask=stored, other=0) >> (4 * t)
                right = tl.load(metadata_at + (block * 8 + 4), mask=stored, other=0) >> (4 * t)
                scale = tl.load(scales + scale_at, mask=stored, other=0)
                pair = tl.load(zeros + scale_at, mask=stored, other=0) if zeros is not None else 0
            scale_upper, scale_lower = low_half(scale, False), high_half(scale, False)
            if zeros is not None:
                zero_upper, zero_lower = (pair & 15).to(tl.float32), (pair >> 4).to(tl.float32)
            else:
                zero_upper, zero_lower = 8.0, 8.0
            weights = ()
            for nibble in tl.static_range(8):
                weights += (_centered(words[block], zero_lower if nibble % 2 else zero_upper, magic, nibble),)
            for m in tl.static_range(M):
                at = x_at + m * groups + block * 32
                if EVEN:
                    x_left = tl.load(at, eviction_policy="evict_last")
                    x_right = tl.load(at + 4, eviction_policy="evict_last")
                else:
                    position = octet * 64 + (first + block) * 32 + i * 8 + t
                    x_left = tl.load(at, mask=position < groups, other=0, eviction_policy="evict_last")
                    x_right = tl.load(at + 4, mask=position + 4 < groups, other=0, eviction_policy="evict_last")
                upper = weights[0] * pick(x_left, (left << 4) & 48, BF16)
                upper += weights[4] * pick(x_left, (left << 2) & 48, BF16)
                upper += weights[2] * pick(x_right, (right << 4) & 48, BF16)
                upper += weights[6] * pick(x_right, (right << 2) & 48, BF16)
                lower = weights[1] * pick(x_left, (left >> 12) & 48, BF16)
                lower += weights[5] * pick(x_left, (left >> 14) & 48, BF16)
                lower += weights[3] * pick(x_right, (right >> 12) & 48, BF16)
                lower += weights[7] * pick(x_right, (right >> 14) & 48, BF16)
                uppers = uppers[:m] + (uppers[m] + upper * scale_upper,) + uppers[m + 1 :]
                lowers = lowers[:m] + (lowers[m] + lower * scale_lower,) + lowers[m + 1 :]
    row = tile_row * 16 + tl.arange(0, 8)
    for m in tl.static_range(M):
        top = tl.sum(tl.sum(tl.reshape(uppers[m], (WARPS, 8, 16)), 2), 0)
        bottom = tl.sum(tl.sum(tl.reshape(lowers[m], (WARPS, 8, 16)), 2), 0)
        if bias is not None:
            top += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
            bottom += tl.load(bias + row + 8, mask=row + 8 < N, other=0).to(tl.float32)
        tl.store(y + m * N + row, top, mask=row < N)
        tl.store(y + m * N + row + 8, bottom, mask=row + 8 < N)
