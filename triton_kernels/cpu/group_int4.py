"""Kept int4 groups (GQSA) on the CPU, balanced by row or over the layer.

CPU layout of a matrix `[R, C]` with groups of G columns: all entries in one list, row r's from `row_start[r]` to
`row_start[r + 1]` (int64). With G of 8 or 16 every row has an even number of them and two share their bytes: byte i of
`codes[T/2, G]` holds column i of the even entry low, of the odd one high. With G of 32 or 64 `codes[T, G/2]` has blocks
of 32 columns as in `int4`. `scales[T]` fp32; `zeros[T]` fp32, or None where all are 8; `numbers[T]`, int16 bit patterns
of uint16: the group's number in its whole row. An entry that makes a row even has scale 0 and reads the group after the
last, where activations are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import groups, groups_layer
from . import matmul
from .int4 import pack_planes, unpack_planes

LANES = 16


class GroupInt4(NamedTuple):
    """A prepared matrix; `columns` is C."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    numbers: Tensor
    row_start: Tensor
    group_size: int
    columns: int


def prepare(packed: groups.Groups, columns: int, *, segments: int = 1) -> GroupInt4:
    """From a matrix `[R, C]` of `formats.groups`, C = `columns`, which must have passed its `validate`."""
    kept = groups.unpack(packed, columns, segments=segments)
    rows, count = kept.numbers.shape
    assert kept.zeros is not None
    flat = groups.KeptGroups(
        kept.codes.flatten(0, 1), kept.scales.flatten(), kept.zeros.flatten(), kept.numbers.flatten()
    )
    return _prepare(flat, torch.arange(rows + 1) * count, columns)


def prepare_layer(packed: groups_layer.LayerGroups, columns: int) -> GroupInt4:
    """From a matrix `[R, C]` of `formats.groups_layer`, C = `columns`, which must have passed its `validate`."""
    entries, row_start = groups_layer.unpack(packed)
    return _prepare(entries, row_start.long(), columns)


def restore(prepared: GroupInt4, *, segments: int = 1) -> groups.Groups:
    """Inverse of `prepare`."""
    (codes, scales, zeros, numbers), row_start = _restore(prepared)
    assert zeros is not None
    shape = (len(row_start) - 1, int(row_start[1]))
    kept = groups.KeptGroups(codes.view(*shape, -1), scales.view(shape), zeros.view(shape), numbers.view(shape))
    return groups.pack(kept, prepared.columns, segments=segments)


def restore_layer(prepared: GroupInt4) -> groups_layer.LayerGroups:
    """Inverse of `prepare_layer`."""
    entries, row_start = _restore(prepared)
    return groups_layer.pack(entries, row_start.int(), prepared.columns)


def rows(prepared: GroupInt4) -> matmul.Rows:
    """For `matmul`'s functions."""
    codes, scales, zeros, numbers, row_start, size, columns = prepared
    padded = (-(-columns // size) + 1) * size
    tensors = (codes, scales, zeros, numbers, row_start)
    return matmul.Rows("groups", (size, zeros is None), len(row_start) - 1, columns, size, size, padded, tensors)


def linear(x: Tensor, prepared: GroupInt4, bias: Tensor | None = None) -> Tensor:
    """`x @ W^T + bias`; see `matmul.linear`."""
    return matmul.linear(rows(prepared))(x, bias)


def _prepare(entries: groups.KeptGroups, row_start: Tensor, columns: int) -> GroupInt4:
    """Entries `[T]` in the CPU layout."""
    codes, scales, zeros, numbers = entries
    assert zeros is not None
    size = codes.shape[-1]
    if size <= LANES:
        counts = row_start.diff()
        even = torch.cat((row_start[:1], (counts + counts % 2).cumsum(0)))
        place = torch.arange(len(codes)) + (even - row_start)[:-1].repeat_interleave(counts)
        total = int(even[-1])
        codes = codes.new_full((total, size), groups.MIDDLE).index_copy(0, place, codes)
        scales = scales.new_zeros(total).index_copy(0, place, scales)
        zeros = zeros.new_full((total,), groups.MIDDLE).index_copy(0, place, zeros)
        numbers = numbers.new_full((total,), -(-columns // size)).index_copy(0, place, numbers)
        packed, row_start = codes[0::2] | codes[1::2] << 4, even
    else:
        packed = pack_planes(codes)
    symmetric = bool((zeros == groups.MIDDLE).all())
    stored = numbers.to(torch.uint16).view(torch.int16)
    return GroupInt4(
        packed.contiguous(), scales.float(), None if symmetric else zeros.float(), stored, row_start, size, columns
    )


def _restore(prepared: GroupInt4) -> tuple[groups.KeptGroups, Tensor]:
    """Inverse of `_prepare`."""
    codes, scales, zeros, numbers, row_start, size, columns = prepared
    dense = torch.stack((codes & 15, codes >> 4), dim=1).flatten(0, 1) if size <= LANES else unpack_planes(codes)
    numbers = numbers.view(torch.uint16).long()
    points = torch.full_like(dense[:, 0], groups.MIDDLE) if zeros is None else zeros.to(torch.uint8)
    real = numbers < -(-columns // size)
    before = torch.cat((row_start[:1], real.cumsum(0)))
    entries = groups.KeptGroups(dense[real], scales[real].half(), points[real], numbers[real])
    return entries, before[row_start]
