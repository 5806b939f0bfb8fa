"""Input-selected int4 and int8 weights on the CPU: dense integers, or kept groups, along the outputs of W^T.

CPU layout: dense integers are `int4`'s of W^T `[K, N]`, fused parts side by side (each padded on its own). Groups are
`group_int4`'s, the K rows of one part under those of another; a part's group numbers count on from the part before, one
unused group between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import groups, integers
from ..formats.input_select import InputSelection
from . import group_int4, int4, selected
from .group_int4 import GroupInt4
from .selected import Columns


def prepare(
    packed: Sequence[integers.Integers],
    selection: InputSelection,
    widths: Sequence[int],
    *,
    bits: int,
    group_size: int,
) -> Columns:
    """From one W^T `[K, widths[p]]` of `formats.integers` per part, and `selection` with as many parts."""
    done = [
        int4.prepare(part, bits=bits, group_size=group_size, columns=width)
        for part, width in zip(packed, widths, strict=True)
    ]
    stride = int4.stride_of(group_size)
    zeros = None if done[0].zeros is None else torch.cat([part.zeros for part in done if part.zeros is not None], 1)
    joined = int4.Integers(
        torch.cat([part.codes for part in done], 1),
        torch.cat([part.scales for part in done], 1),
        zeros,
        bits,
        group_size,
        sum(widths),
    )
    parts = selected.part_table(widths, [stride * part.scales.shape[1] for part in done])
    rows = int4.rows(joined)
    return Columns(
        rows,
        rows.n,
        sum(widths),
        parts,
        selected.select_inputs(selection, parts, rows.padded, group_size, stride),
    )


def prepare_groups(packed: Sequence[groups.Groups], selection: InputSelection, widths: Sequence[int]) -> Columns:
    """From one W^T `[K, widths[p]]` of `formats.groups` (one segment) per part, and `selection` with as many parts."""
    done = [group_int4.prepare(part, width) for part, width in zip(packed, widths, strict=True)]
    size, k = done[0].group_size, len(done[0].row_start) - 1
    taken = [-(-width // size) + 1 for width in widths]
    zeros = None
    if any(part.zeros is not None for part in done):
        middle = [torch.full_like(part.scales, groups.MIDDLE) if part.zeros is None else part.zeros for part in done]
        zeros = torch.cat(middle)
    columns, starts, group, entry = [], [torch.zeros(1, dtype=torch.int64)], 0, 0
    for part, count in zip(done, taken, strict=True):
        columns.append(part.numbers.view(torch.uint16).long() + group)
        starts.append(part.row_start[1:] + entry)
        group, entry = group + count, entry + len(part.scales)
    joined = GroupInt4(
        torch.cat([part.codes for part in done]),
        torch.cat([part.scales for part in done]),
        zeros,
        torch.cat(columns).to(torch.uint16).view(torch.int16),
        torch.cat(starts),
        size,
        (group - 1) * size,
    )
    parts = selected.part_table(widths, [size * count for count in taken])
    rows = group_int4.rows(joined)
    return Columns(rows, k, sum(widths), parts, selected.select_inputs(selection, parts, rows.padded, size, size))


def linear(x: Tensor, prepared: Columns, bias: Tensor | None = None) -> Tensor:
    """`select(x) @ W^T + (x - select(x)) @ V @ U^T + bias`; see `selected.linear`."""
    return selected.linear(prepared, x, bias)
