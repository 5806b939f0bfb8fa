"""Groups (GQSA, arXiv 2412.17560): 1xG groups of columns are kept or dropped whole; every row keeps equally many.

Layout of a matrix `[..., R, C]`, grouped along its last axis, G one of 8, 16, 32, 64. A row has ceil(C / G) groups, the
last padded to G columns, split into S equal segments (S = 1, or a split that tensor parallelism can cut at: then G * S
divides C). It keeps J groups, J/S in every segment, numbered within their segment:

- `codes[..., R, J, G/2]`, uint8: int4 codes; byte b holds column 2b of the group low, 2b + 1 high.
- `scales[..., R, J]`, int16: bit patterns of fp16, finite and >= 0.
- `index[..., R, J]`, int16 bit patterns of the uint16 `number | zero << 12`: the group's number in its segment (0 to
  ceil(C / G) / S - 1, at most 4095; strictly ascending inside a segment) and its integer zero point. The J entries are
  S runs of J/S. Symmetric codes store the zero point 8.

`value = scale * (code - zero)`, exact in fp32; dropped groups are 0. Columns past C (in a padded last group) hold the
zero point. Cost: 12 bytes per kept group of 16, 3 bits per weight with half of the groups kept. `groups_layer` is the
variant whose rows keep different counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import FormatError
from .bits import check_magnitudes, check_none, check_tensor, from_bits, pack_nibbles, to_bits, unpack_nibbles

SIZES = (8, 16, 32, 64)
SEGMENTS = (8, 4, 2, 1)
MAX_NUMBER = 4095
MIDDLE = 8


class KeptGroups(NamedTuple):
    """Kept groups before packing, as a quantizer makes them.

    `codes[..., R, J, G]` uint8 0..15; `scales[..., R, J]` float16; `zeros[..., R, J]` uint8 0..15, or None for 8;
    `numbers[..., R, J]` int64: the group's number in its whole row, strictly ascending.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    numbers: Tensor


class Groups(NamedTuple):
    """The stored tensors (see the module's docstring)."""

    codes: Tensor
    scales: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses here


def choose_segments(columns: int, group_size: int, kept: int) -> int:
    """The largest S of 8, 4, 2, 1 that splits `columns` and `kept` groups per row evenly (for row-parallel linears)."""
    return next(s for s in SEGMENTS if s == 1 or (columns % (group_size * s) == 0 and kept % s == 0))


def packed_shapes(
    shape: tuple[int, ...], *, group_size: int, kept: int, segments: int = 1
) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for a matrix `[..., R, C]` with `kept` groups per row; FormatError if impossible."""
    *lead, columns = shape
    total = count_groups(columns, group_size)
    if segments not in SEGMENTS or (segments > 1 and (columns % (group_size * segments) or kept % segments)):
        raise FormatError(f"{segments} segments do not split {columns} columns and {kept} kept groups of {group_size}")
    if not 0 <= kept <= total:
        raise FormatError(f"rows cannot keep {kept} of {total} groups")
    if total // segments > MAX_NUMBER + 1:
        raise FormatError(f"a segment has {total // segments} groups; the format counts to {MAX_NUMBER + 1}")
    return {"codes": (*lead, kept, group_size // 2), "scales": (*lead, kept), "index": (*lead, kept)}


def pack(groups: KeptGroups, columns: int, *, segments: int = 1) -> Groups:
    """Store `groups` of a matrix `[..., R, C]` with `columns` = C; raises FormatError for what the format cannot hold.

    Codes of columns past C are replaced by the zero point.
    """
    *lead, kept, group_size = groups.codes.shape
    shapes = packed_shapes((*lead, columns), group_size=group_size, kept=kept, segments=segments)
    per_segment = count_groups(columns, group_size) // segments
    check_tensor("numbers", groups.numbers, shapes["index"], torch.int64)
    local = groups.numbers - segment_starts(kept, per_segment, segments, groups.numbers.device)
    packed = Groups(*pack_entries(groups, local, columns))
    validate(packed, (*lead, columns), group_size=group_size, kept=kept, segments=segments)
    return packed


def unpack(packed: Groups, columns: int, *, segments: int = 1) -> KeptGroups:
    """Inverse of `pack`; zeros are always given. The tensors must have passed `validate`."""
    group_size, kept = 2 * packed.codes.shape[-1], packed.index.shape[-1]
    codes, scales, zeros, local = unpack_entries(packed)
    per_segment = count_groups(columns, group_size) // segments
    return KeptGroups(codes, scales, zeros, local + segment_starts(kept, per_segment, segments, local.device))


def dequantize(packed: Groups, columns: int, *, segments: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix `[..., R, C]` with its zeros: exact in fp32 and fp64, rounded once to a narrower `dtype`."""
    groups = unpack(packed, columns, segments=segments)
    *lead, _, group_size = groups.codes.shape
    values = entry_values(groups, dtype)
    dense = values.new_zeros((*lead, count_groups(columns, group_size), group_size))
    dense.scatter_(-2, groups.numbers[..., None].expand_as(values), values)
    return dense.flatten(-2)[..., :columns].contiguous()


def validate(packed: Groups, shape: tuple[int, ...], *, group_size: int, kept: int, segments: int = 1) -> None:
    """Raise FormatError unless `packed` is a valid matrix of `shape` `[..., R, C]` keeping `kept` groups per row.

    After it every number points inside its segment and no group appears twice.
    """
    shapes = packed_shapes(shape, group_size=group_size, kept=kept, segments=segments)
    check_entries(packed, shapes)
    per_segment = count_groups(shape[-1], group_size) // segments
    local = index_numbers(packed.index)
    check_none("index", f"a group number past {per_segment - 1}", local >= per_segment)
    runs = local.unflatten(-1, (segments, kept // segments))
    check_none("index", "out of ascending order", runs[..., 1:] <= runs[..., :-1])
    if shape[-1] % group_size:
        check_padding(packed, local == per_segment - 1, shape[-1] % group_size)


def count_groups(columns: int, group_size: int) -> int:
    """Groups of a row, the padded one included; raises FormatError for an unsupported size."""
    if group_size not in SIZES:
        raise FormatError(f"groups have {', '.join(map(str, SIZES))} columns, got {group_size}")
    return -(-columns // group_size)


def segment_starts(kept: int, per_segment: int, segments: int, device: torch.device) -> Tensor:
    """int64 `[kept]`: the number of the first group of the segment that each entry lies in."""
    return torch.arange(segments, device=device).repeat_interleave(kept // segments) * per_segment


def pack_entries(groups: KeptGroups, local: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes, scales, index)` of entries numbered `local` within their segment; shared by both variants."""
    entries, group_size = tuple(local.shape), groups.codes.shape[-1]
    check_tensor("codes", groups.codes, (*entries, group_size), torch.uint8)
    check_tensor("scales", groups.scales, entries, torch.float16)
    zeros = torch.full_like(groups.codes[..., 0], MIDDLE) if groups.zeros is None else groups.zeros
    check_tensor("zeros", zeros, entries, torch.uint8)
    check_none("codes", "no 4-bit code", groups.codes > 15)
    check_none("zeros", "no 4-bit code", zeros > 15)
    check_none("numbers", f"outside 0..{MAX_NUMBER} in its segment", (local < 0) | (local > MAX_NUMBER))
    codes = groups.codes
    if columns % group_size:
        inside = torch.arange(group_size, device=codes.device) < columns % group_size
        last = groups.numbers == columns // group_size
        codes = torch.where(inside | ~last[..., None], codes, zeros[..., None])
    index = (local | zeros.long() << 12).to(torch.uint16).view(torch.int16)
    return pack_nibbles(codes), to_bits(groups.scales).clone(), index


def unpack_entries(packed: Groups) -> KeptGroups:
    """Inverse of `pack_entries`, with numbers still local to their segment."""
    codes = unpack_nibbles(packed.codes, 2 * packed.codes.shape[-1])
    zeros = (packed.index.view(torch.uint16).to(torch.int32) >> 12).to(torch.uint8)
    return KeptGroups(codes, from_bits(packed.scales), zeros, index_numbers(packed.index))


def entry_values(groups: KeptGroups, dtype: torch.dtype) -> Tensor:
    """Dequantized entries `[..., J, G]`."""
    zeros = MIDDLE if groups.zeros is None else groups.zeros[..., None].float()
    return ((groups.codes.float() - zeros) * groups.scales[..., None].float()).to(dtype)


def index_numbers(index: Tensor) -> Tensor:
    """Group numbers within their segment, int64."""
    return index.long() & MAX_NUMBER


def check_entries(packed: Groups, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise FormatError for a wrong shape or dtype, or a scale that is no magnitude."""
    check_tensor("codes", packed.codes, shapes["codes"], torch.uint8)
    check_tensor("scales", packed.scales, shapes["scales"], torch.int16)
    check_tensor("index", packed.index, shapes["index"], torch.int16)
    check_magnitudes("scales", packed.scales)


def check_padding(packed: Groups, last: Tensor, inside: int) -> None:
    """Raise FormatError unless the columns from `inside` on of the entries marked `last` hold their zero point."""
    groups = unpack_entries(
        packed._replace(codes=packed.codes[last], scales=packed.scales[last], index=packed.index[last])
    )
    assert groups.zeros is not None
    check_none("codes", "padding but not its zero point", groups.codes[..., inside:] != groups.zeros[..., None])
