"""What an input-selected int4 linear computes, in plain torch on the stored tensors, in the dtype of x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import groups, integers
from ..formats.groups import Groups
from ..formats.input_select import InputSelection
from ..formats.integers import Integers
from ..input_select import reference


def linear(
    x: Tensor,
    packed: Sequence[Integers] | Sequence[Groups],
    selection: InputSelection,
    widths: Sequence[int],
    bias: Tensor | None = None,
    *,
    group_size: int,
    segments: int = 1,
    masked: bool = True,
) -> Tensor:
    """`y = select(x) W^T + (x - select(x)) V U^T + bias` for `x[..., K]`; see `input_select.reference.linear`.

    `packed`: W^T `[K, widths[p]]` of each fused part, as dense integers of 4 bits or as kept groups along the outputs.
    `masked=False` uses all inputs, and no branch.
    """
    weight = dense(packed, widths, group_size=group_size, segments=segments, dtype=x.dtype)
    return reference.linear(x, weight, selection, bias, parts=widths, masked=masked)


def dense(
    packed: Sequence[Integers] | Sequence[Groups],
    widths: Sequence[int],
    *,
    group_size: int,
    segments: int = 1,
    dtype: torch.dtype,
) -> Tensor:
    """W^T `[K, sum(widths)]`, rounded once to `dtype`."""
    blocks = []
    for part, width in zip(packed, widths, strict=True):
        if isinstance(part, Groups):
            blocks.append(groups.dequantize(part, width, segments=segments, dtype=dtype))
        elif isinstance(part, Integers):
            blocks.append(integers.dequantize(part, bits=4, group_size=group_size, columns=width, dtype=dtype))
    return torch.cat(blocks, dim=-1)
