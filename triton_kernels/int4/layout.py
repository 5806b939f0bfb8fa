"""GPU order of dense integers: the A fragments of `mma.m16n8k16`, sixteen rows at a time, made once after load.

A weight `[..., N, K]` is padded to tiles of 16 rows and chunks of 64 columns. With `g` 0..7, `t` 0..3 and a lane `4g
+ t`, a lane's share of a chunk is rows g and g + 8, columns `32p + 8t .. 32p + 8t + 7` for p = 0, 1: what `mma`
wants, with the columns of a chunk permuted so that a lane's activations are 16 contiguous bytes. (A sum over columns
does not mind, as long as weights and activations are permuted alike.)

- `codes[..., tiles, blocks, 128]` int32, word `4 * lane + i`; a block has 512 bytes, one 16-byte load per lane.
  4 bits: a block is a chunk, i = 2p + q. Nibble `4h + 2c + half` of the word is row `g + 8 half`, column
  `32p + 8t + 4q + 2c + h`. 8 bits: a block is half a chunk (one p). Byte `2 half + h` is row `g + 8 half`, column
  `32p + 8t + 2i + h`.
- `scales[..., tiles, quads, 8, 4]` int32: for `g` and the four groups of a quad, the fp16 bits of row g low, of row g
  + 8 high.
- `zeros`, asymmetric only. 4 bits: `[..., tiles, quads, 8]` int32, byte j of group j: row g low, row g + 8 high. 8
  bits: `[..., tiles, quads, 8, 2]`, byte j of word `half`.

Groups have 32, 64 or 128 columns here (a larger group is cut, its scale repeated), or 0: one group per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import FormatError, integers
from ..formats.bits import from_bits, to_bits
from ..formats.integers import Integers, Quantized

ROWS = 16
CHUNK = 64
GROUPS = (128, 64, 32)


class Prepared(NamedTuple):
    """A weight in GPU order (see the module's docstring), its bits, group size, N (`rows`) and K (`columns`)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    rows: int
    columns: int

    def expert(self, index: int) -> Prepared:
        """The weight of one expert, sharing memory."""
        zeros = None if self.zeros is None else self.zeros[index]
        return self._replace(codes=self.codes[index], scales=self.scales[index], zeros=zeros)


def kernel_group(group_size: int, columns: int) -> int:
    """The group size that the kernels work with; raises FormatError for one that they cannot."""
    if group_size >= columns:
        return 0
    for size in GROUPS:
        if group_size % size == 0:
            return size
    raise FormatError(f"GPU kernels need groups of a multiple of {GROUPS[-1]} columns, got {group_size}")


def prepared_shapes(shape: tuple[int, ...], *, bits: int, group: int, symmetric: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a `Prepared` weight `[..., N, K]`; `group` as from `kernel_group`."""
    *lead, rows, columns = shape
    tiles = -(-rows // ROWS)
    quads = -(-columns // (4 * group)) if group else 1
    shapes: dict[str, tuple[int, ...]] = {
        "codes": (*lead, tiles, -(-columns // CHUNK) * bits // 4, 128),
        "scales": (*lead, tiles, quads, 8, 4),
    }
    if not symmetric:
        shapes["zeros"] = (*lead, tiles, quads, 8) if bits == 4 else (*lead, tiles, quads, 8, 2)
    return shapes


def prepare(packed: Integers, *, bits: int, group_size: int, columns: int) -> Prepared:
    """GPU order of a validated `packed` `[..., N, K]`, K = `columns`; raises FormatError for unusable groups."""
    group = kernel_group(group_size, columns)
    codes, scales, zeros = integers.unpack(packed, bits=bits, group_size=group_size, columns=columns)
    rows = codes.shape[-2]
    bit_patterns = to_bits(scales)
    if group and group < group_size:
        count = -(-columns // group)
        bit_patterns = bit_patterns.repeat_interleave(group_size // group, -1)[..., :count]
        zeros = None if zeros is None else zeros.repeat_interleave(group_size // group, -1)[..., :count]
    return Prepared(
        _order_codes(codes, bits),
        order_scales(bit_patterns),
        None if zeros is None else _order_zeros(zeros, bits),
        bits,
        group,
        rows,
        columns,
    )


def restore(prepared: Prepared, *, group_size: int) -> Integers:
    """Inverse of `prepare`: the file's tensors, whose groups have `group_size` columns."""
    bits, rows, columns = prepared.bits, prepared.rows, prepared.columns
    part = prepared.codes.contiguous().view(torch.uint8)
    if bits == 4:
        nibbles = torch.stack((part & 15, part >> 4), -1)
        split = nibbles.flatten(-2).unflatten(-1, (8, 4, 2, 2, 2, 2, 2))  # tiles, chunks, g, t, p, q, h, c, half
        codes = move(split, "TCgtpqhcH", "THgCptqch").flatten(-6)
    else:
        split = part.unflatten(-1, (8, 4, 4, 2, 2))  # tiles, blocks, g, t, i, half, h
        codes = move(split, "TBgtiHh", "THgBtih").flatten(-4)
    codes = codes.flatten(-4, -2)[..., :rows, :columns]
    scales = prepared.scales.contiguous().view(torch.int16).unflatten(-1, (4, 2))
    zeros = None
    if prepared.zeros is not None:
        bytes_ = prepared.zeros.contiguous()[..., None].view(torch.uint8)
        pairs = torch.stack((bytes_ & 15, bytes_ >> 4), -1) if bits == 4 else bytes_.transpose(-1, -2)
        zeros = _rows(pairs, prepared, group_size)
    quantized = Quantized(codes.contiguous(), from_bits(_rows(scales, prepared, group_size)), zeros)
    return integers.pack(quantized, bits=bits, group_size=group_size)


def _rows(per_group: Tensor, prepared: Prepared, group_size: int) -> Tensor:
    """`[..., tiles, quads, g, j, half]` -> `[..., N, J]` with one entry per group of the file."""
    wide = move(per_group, "TQgjH", "THgQj").flatten(-5, -3).flatten(-2)
    step = group_size // prepared.group if prepared.group else 1
    count = -(-prepared.columns // group_size)
    return wide[..., : prepared.rows, ::step][..., :count].contiguous()


def _order_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., N, K]` -> int32 `[..., tiles, blocks, 128]`."""
    rows, columns = codes.shape[-2:]
    padded = F.pad(codes, (0, -columns % CHUNK, 0, -rows % ROWS), value=integers.middle(bits))
    tiled = padded.unflatten(-2, (-1, 2, 8))
    if bits == 4:
        split = tiled.unflatten(-1, (-1, 2, 4, 2, 2, 2))  # tiles, half, g, chunks, p, t, q, c, h
        nibbles = move(split, "THgCptqch", "TCgtpqhcH")
        bytes_ = (nibbles[..., 0] | nibbles[..., 1] << 4).flatten(-6)
    else:
        split = tiled.unflatten(-1, (-1, 4, 4, 2))  # tiles, half, g, blocks, t, i, h
        bytes_ = move(split, "THgBtih", "TBgtiHh").flatten(-5)
    return bytes_.contiguous().view(torch.int32)


def order_scales(bit_patterns: Tensor) -> Tensor:
    """int16 `[..., N, J]` -> int32 `[..., tiles, quads, 8, 4]`."""
    return move(_quads(bit_patterns), "THgQj", "TQgjH").contiguous().view(torch.int32)[..., 0]


def _order_zeros(zeros: Tensor, bits: int) -> Tensor:
    """uint8 `[..., N, J]` -> int32 `[..., tiles, quads, 8]` for 4 bits, `[..., tiles, quads, 8, 2]` for 8."""
    if bits == 8:
        return move(_quads(zeros), "THgQj", "TQgHj").contiguous().view(torch.int32)[..., 0]
    pairs = move(_quads(zeros), "THgQj", "TQgjH")
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)[..., 0]


def _quads(per_group: Tensor) -> Tensor:
    """`[..., N, J]` -> `[..., tiles, half, g, quads, j]`, padded with 0."""
    rows, count = per_group.shape[-2:]
    padded = F.pad(per_group, (0, -count % 4, 0, -rows % ROWS))
    return padded.unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 4))


def move(tensor: Tensor, before: str, after: str) -> Tensor:
    """Permute the last axes, one letter each."""
    lead = tensor.ndim - len(before)
    return tensor.permute(*range(lead), *(lead + before.index(letter) for letter in after))
