"""Groups balanced over a whole matrix: as `groups`, but rows keep different counts (`balance: layer`).

Layout of a matrix `[R, C]` with T kept groups in all, one segment, no leading axes:

- `codes[T, G/2]`, `scales[T]`, `index[T]`: the entries of `groups`, row after row.
- `row_start[R + 1]`, int32: row r owns entries `row_start[r]` to `row_start[r + 1]`; from 0 to T, never falling.

Group numbers ascend strictly inside a row; rows may be empty. Tensor parallelism cannot cut it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import FormatError, groups
from .bits import check_none, check_tensor
from .groups import Groups, KeptGroups


class LayerGroups(NamedTuple):
    """The stored tensors (see the module's docstring)."""

    codes: Tensor
    scales: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody misses here
    row_start: Tensor

    @property
    def entries(self) -> Groups:
        """All entries, without their split into rows."""
        return Groups(self.codes, self.scales, self.index)


def packed_shapes(shape: tuple[int, ...], *, group_size: int, kept: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for `shape` `(R, C)` with `kept` = T groups in all; FormatError if impossible."""
    if len(shape) != 2:
        raise FormatError(f"layer-balanced groups store one matrix, got shape {list(shape)}")
    rows, columns = shape
    total = groups.count_groups(columns, group_size)
    if not 0 <= kept <= min(rows * total, 2**31 - 1):
        raise FormatError(f"a matrix cannot keep {kept} of {rows * total} groups")
    if total > groups.MAX_NUMBER + 1:
        raise FormatError(f"a row has {total} groups; the format counts to {groups.MAX_NUMBER + 1}")
    return {"codes": (kept, group_size // 2), "scales": (kept,), "index": (kept,), "row_start": (rows + 1,)}


def pack(entries: KeptGroups, row_start: Tensor, columns: int) -> LayerGroups:
    """Store `entries` (leading axis T) split into rows by int32 `row_start`; raises FormatError as `validate` does."""
    if entries.codes.ndim != 2 or row_start.ndim != 1:
        raise FormatError("layer-balanced groups need codes [T, G] and row_start [R + 1]")
    kept, group_size = entries.codes.shape
    shape = (len(row_start) - 1, columns)
    shapes = packed_shapes(shape, group_size=group_size, kept=kept)
    check_tensor("numbers", entries.numbers, shapes["index"], torch.int64)
    packed = LayerGroups(*groups.pack_entries(entries, entries.numbers, columns), row_start.clone())
    validate(packed, shape, group_size=group_size, kept=kept)
    return packed


def unpack(packed: LayerGroups) -> tuple[KeptGroups, Tensor]:
    """Inverse of `pack`: entries (zeros always given) and `row_start`. The tensors must have passed `validate`."""
    return groups.unpack_entries(packed.entries), packed.row_start


def dequantize(packed: LayerGroups, columns: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix `[R, C]` with its zeros: exact in fp32 and fp64, rounded once to a narrower `dtype`."""
    entries, _ = unpack(packed)
    group_size = entries.codes.shape[-1]
    values = groups.entry_values(entries, dtype)
    rows = entry_rows(packed.row_start, len(packed.scales))
    dense = values.new_zeros((len(packed.row_start) - 1, groups.count_groups(columns, group_size), group_size))
    dense[rows, entries.numbers] = values
    return dense.flatten(-2)[:, :columns].contiguous()


def validate(packed: LayerGroups, shape: tuple[int, ...], *, group_size: int, kept: int) -> None:
    """Raise FormatError unless `packed` is a valid matrix of `shape` `(R, C)` keeping `kept` groups in all."""
    shapes = packed_shapes(shape, group_size=group_size, kept=kept)
    groups.check_entries(packed.entries, shapes)
    check_tensor("row_start", packed.row_start, shapes["row_start"], torch.int32)
    if int(packed.row_start[0]) != 0 or int(packed.row_start[-1]) != kept:
        raise FormatError(f"row_start must run from 0 to {kept}")
    check_none("row_start", "below the one before", packed.row_start[1:] < packed.row_start[:-1])
    numbers, total = groups.index_numbers(packed.index), groups.count_groups(shape[-1], group_size)
    check_none("index", f"a group number past {total - 1}", numbers >= total)
    rows = entry_rows(packed.row_start, len(packed.scales))
    check_none("index", "out of ascending order", (rows[1:] == rows[:-1]) & (numbers[1:] <= numbers[:-1]))
    if shape[-1] % group_size:
        groups.check_padding(packed.entries, numbers == total - 1, shape[-1] % group_size)


def entry_rows(row_start: Tensor, total: int) -> Tensor:
    """int64 `[T]`: the row that owns each of the `total` = T entries."""
    counts = (row_start[1:] - row_start[:-1]).long()
    return torch.arange(len(counts), device=row_start.device).repeat_interleave(counts, output_size=total)
