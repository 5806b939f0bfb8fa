"""The order of an input-selected int4 linear on the GPU, made once after load, and its inverse.

A row holds the codes of one input, all parts side by side, in the files' order; the unit that has a scale is an entry.
A tile has up to eight groups and up to 128 columns.

- dense: parts are padded to whole tiles; entries are groups, or 128 columns of them where groups are wider.
- kept groups: only those lie in `codes`. `entries[T, K]`, int32, says what a row keeps in a tile: bits 0-7 which
  groups; bits 8-9, 10-12 and 13-15 how many of them come before groups 2, 4 and 6; from bit 16 the row's entry that
  is the tile's first.

`codes[K, kept * G / 8]` int32 of 8 codes, the first in the low bits; `scales[K, kept]` fp16; `zeros` uint8, two zero
points of all entries in a byte, the even one in the low bits, or None where all are 8. `tiles` as in
`input_select.layout`, but their last number is the bits of 1.0, which kernels need. Selection and branch are an
`input_select.layout.Prepared` whose weight is `U^T` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import groups, integers
from ..formats.bits import from_bits, pack_nibbles, unpack_nibbles
from ..formats.groups import Groups
from ..formats.input_select import InputSelection
from ..formats.integers import Integers
from ..input_select import layout as select_layout
from ..input_select.layout import tile_table
from .split import workspace_size

TILE = 128  # columns of a tile, at most
MIDDLE = 8
BITS_OF_ONE = 0x3F800000


class Prepared(NamedTuple):
    """One linear ready for the GPU (see the module's docstring); with experts, tensors lead with `[E, ...]`.

    `group_size`: columns of an entry; `stored_group_size` and `segments`: the files'; `kept`: entries of a row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    entries: Tensor | None
    tiles: Tensor
    select: select_layout.Prepared
    group_size: int
    stored_group_size: int
    segments: int
    kept: int

    def expert(self, index: int) -> Prepared:
        """One expert's linear, as views."""
        return self._replace(
            codes=self.codes[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            entries=None if self.entries is None else self.entries[index],
            select=self.select.expert(index),
        )


def tile_width(group_size: int) -> int:
    """Columns of a tile."""
    return min(8 * group_size, TILE)


def unsupported(group_size: int, widths: Sequence[int]) -> str:
    """Why dense groups of this size have no kernel, or an empty text."""
    if group_size in (8, 16, 32, 64) or group_size % TILE == 0 or all(width <= group_size for width in widths):
        return ""
    return f"groups of {group_size} columns neither divide {TILE} nor are whole multiples of it"


def prepare(
    packed: Sequence[Integers] | Sequence[Groups],
    selection: InputSelection,
    widths: Sequence[int],
    *,
    group_size: int,
    segments: int = 1,
    workspace: Tensor | None = None,
) -> Prepared:
    """GPU order of W^T `[..., K, widths[p]]` of every fused part, and their validated `selection`.

    Raises ValueError for dense groups of an unsupported size. `workspace`: fp32, at least `workspace_size` numbers, to
    share one between linears; by default a new one.
    """
    widths = tuple(widths)
    first = packed[0]
    if isinstance(first, Groups):
        size = group_size
        found = [
            _kept_groups(part, width, segments)
            for part, width in zip(packed, widths, strict=True)
            if isinstance(part, Groups)
        ]
        blocks = [block[:3] for block in found]
        entries = _entry_words([block[3] for block in found], widths, group_size)
    else:
        if problem := unsupported(group_size, widths):
            raise ValueError(problem)
        size = group_size if group_size <= 64 else TILE
        blocks = [
            _dense_groups(part, width, group_size, size)
            for part, width in zip(packed, widths, strict=True)
            if isinstance(part, Integers)
        ]
        entries = None
    codes, scales, zeros = (torch.cat([block[i] for block in blocks], dim=-1) for i in range(3))
    *lead, k, kept = scales.shape
    tiles = tile_table(widths, tile_width(size))
    tiles[:, 3] = BITS_OF_ONE
    tiles = tiles.to(codes.device)
    if workspace is None:
        rank = 0 if selection.V is None else selection.V.shape[-1]
        workspace = codes.new_empty(workspace_size(sum(widths), k, rank, len(widths), len(tiles)), dtype=torch.float32)
    dtype = torch.float16 if selection.U is None else selection.U.dtype
    nothing = torch.empty((*lead, 0, sum(widths)), dtype=dtype, device=codes.device)
    select = select_layout.prepare(nothing, selection, parts=widths, workspace=workspace)._replace(k=k)
    return Prepared(
        codes=_as_words(codes),
        scales=scales,
        zeros=None if _all_middle(zeros) else pack_nibbles(zeros.flatten(-2)),
        entries=entries,
        tiles=tiles,
        select=select,
        group_size=size,
        stored_group_size=group_size,
        segments=segments,
        kept=kept,
    )


def restore(prepared: Prepared, *, symmetric: bool) -> tuple[list[Integers] | list[Groups], InputSelection]:
    """Inverse of `prepare`. `symmetric`: dense integers without zeros."""
    _, selection = select_layout.restore(prepared.select._replace(k=0))
    codes = prepared.codes.view(torch.uint8)
    zeros = torch.full_like(prepared.scales, MIDDLE, dtype=torch.uint8)
    if prepared.zeros is not None:
        zeros = unpack_nibbles(prepared.zeros, zeros.shape[-2] * zeros.shape[-1]).view_as(zeros)
    widths, size, stored = prepared.select.parts, prepared.group_size, prepared.stored_group_size
    parts: list[Integers] | list[Groups] = []
    first = 0
    if prepared.entries is not None:
        masks, tile = _stored_groups(prepared), 0
        for width in widths:
            last_tile = tile - (-width // tile_width(size))
            numbers = masks[..., tile:last_tile, :].flatten(-2)
            kept = int(numbers.sum(-1).max()) if numbers.numel() else 0
            found = numbers.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :kept]
            here = slice(first, first + kept)
            nibbles = unpack_nibbles(codes, 2 * codes.shape[-1]).unflatten(-1, (-1, size))[..., here, :]
            entry = groups.KeptGroups(nibbles, prepared.scales[..., here], zeros[..., here], found)
            parts.append(groups.pack(entry, width, segments=prepared.segments))  # type: ignore[arg-type]
            first, tile = first + kept, last_tile
        return parts, selection
    for width in widths:
        whole = -(-width // tile_width(size)) * tile_width(size)
        count = -(-width // stored)
        here = slice(first // size, (first + whole) // size)
        nibbles = unpack_nibbles(codes[..., first // 2 : (first + whole) // 2], whole)
        spread = torch.arange(count, device=codes.device) * stored // size
        part_zeros = zeros[..., here][..., spread]
        quantized = integers.Quantized(
            nibbles[..., :width].contiguous(),
            prepared.scales[..., here][..., spread].contiguous(),
            None if symmetric else part_zeros.contiguous(),
        )
        parts.append(integers.pack(quantized, bits=4, group_size=stored))  # type: ignore[arg-type]
        first += whole
    return parts, selection


def _dense_groups(part: Integers, width: int, stored: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(bytes of codes, scales, zeros)` of one part, padded to whole tiles; entries of `size` columns."""
    whole = -(-width // tile_width(size)) * tile_width(size)
    count = part.scales.shape[-1]
    codes = unpack_nibbles(part.codes, count * stored)[..., :width]
    spread = torch.arange(0, whole, size, device=codes.device) // stored
    inside = spread < count
    spread = spread.clamp(max=count - 1)
    zeros = torch.full_like(part.scales, MIDDLE, dtype=torch.uint8)
    if part.zeros is not None:
        zeros = unpack_nibbles(part.zeros, count)
    scales = torch.where(inside, from_bits(part.scales)[..., spread], 0)
    zeros = torch.where(inside, zeros[..., spread], MIDDLE)
    return pack_nibbles(torch.nn.functional.pad(codes, (0, whole - width))), scales, zeros.to(torch.uint8)


def _kept_groups(part: Groups, width: int, segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(bytes of codes, scales, zeros, group numbers in the whole row)` of one part."""
    kept = groups.unpack(part, width, segments=segments)
    assert kept.zeros is not None
    return part.codes.flatten(-2), from_bits(part.scales), kept.zeros, kept.numbers


def _entry_words(numbers: Sequence[Tensor], widths: Sequence[int], group_size: int) -> Tensor:
    """`entries[..., T, K]` of parts with group numbers `[..., K, J]`."""
    per_tile = tile_width(group_size) // group_size
    words, first = [], 0
    for number, width in zip(numbers, widths, strict=True):
        tiles = -(-width // tile_width(group_size))
        stored = torch.zeros((*number.shape[:-1], tiles * 8), dtype=torch.int64, device=number.device)
        stored.scatter_(-1, number // per_tile * 8 + number % per_tile, 1)
        stored = stored.unflatten(-1, (tiles, 8))
        counts = stored.sum(-1)
        start = first + counts.cumsum(-1) - counts
        place = torch.tensor([1 << bit for bit in range(8)], device=number.device)
        before = stored[..., :2].sum(-1) << 8 | stored[..., :4].sum(-1) << 10 | stored[..., :6].sum(-1) << 13
        words.append((stored * place).sum(-1) | before | start << 16)
        first += number.shape[-1]
    word = torch.cat(words, dim=-1).transpose(-1, -2)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).contiguous()


def _as_words(codes: Tensor) -> Tensor:
    """Bytes `[..., 4 n]` as int32 `[..., n]`; torch does not view tensors without elements so."""
    if codes.numel() == 0:
        return codes.new_empty((*codes.shape[:-1], codes.shape[-1] // 4), dtype=torch.int32)
    return codes.contiguous().view(torch.int32)


def _all_middle(zeros: Tensor) -> bool:
    """Whether every zero point is 8 (no, where there is no data)."""
    return not zeros.is_meta and bool((zeros == MIDDLE).all())


def _stored_groups(prepared: Prepared) -> Tensor:
    """bool `[..., K, T, groups of a tile]`."""
    assert prepared.entries is not None
    group = torch.arange(tile_width(prepared.group_size) // prepared.group_size, device=prepared.codes.device)
    return (prepared.entries.transpose(-1, -2)[..., None] >> group & 1) > 0
