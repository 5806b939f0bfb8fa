"""What an input-selected linear computes, in plain torch on the stored tensors, in the dtype of x (fp64 in tests)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..formats.bits import from_bits
from ..formats.input_select import InputSelection


def linear(
    x: Tensor,
    weight: Tensor,
    selection: InputSelection,
    bias: Tensor | None = None,
    *,
    parts: Sequence[int] | None = None,
    masked: bool = True,
) -> Tensor:
    """`y = select(x) W^T + (x - select(x)) V U^T + bias`; a row of y depends on that row of x alone.

    `x[..., K]`, `weight[K, N]` (input-major), `parts`: output sizes of the fused parts, by default one of N. Every
    product is formed in x's dtype. `masked=False` uses all inputs, and so no branch: a dense prefill.
    """
    x_ = x.reshape(-1, x.shape[-1])
    weight = weight.to(x.dtype)
    if not masked:
        y = x_ @ weight
    else:
        blocks = []
        for part, columns in part_columns(parts or (weight.shape[1],)):
            used = selected(x_, selection, part)
            block = torch.where(used, x_, 0) @ weight[:, columns]
            if selection.V is not None and selection.U is not None:
                rest = torch.where(used, 0, x_) @ selection.V[part].to(x.dtype)
                block = block + rest @ selection.U[columns].to(x.dtype).T
            blocks.append(block)
        y = torch.cat(blocks, dim=-1)
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(x.dtype)


def selected(x: Tensor, selection: InputSelection, part: int) -> Tensor:
    """bool `[M, K]`: the inputs of `x[M, K]` that fused part `part` reads. Scores are fp32; NaN counts as selected."""
    score = x.float().abs()
    if selection.norms is not None:
        score = score * from_bits(selection.norms)[part]
    return ~(score <= from_bits(selection.thresholds)[part])


def part_columns(parts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """`(part, its output columns)` of fused parts with these sizes."""
    start = 0
    for part, size in enumerate(parts):
        yield part, slice(start, start + size)
        start += size
