"""What an input-selected linear computes, in plain torch on the stored tensors, in the dtype of x (fp64 in tests)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..formats.bits import from_bits
from ..formats.input_select import InputSelection

SIGNLESS, INFINITY = 0x7FFFFFFF, 0x7F800000  # bits of fp32


def linear(
    x: Tensor,
    weight: Tensor,
    selection: InputSelection,
    bias: Tensor | None = None,
    *,
    parts: Sequence[int] | None = None,
    masked: bool = True,
    cuts: Tensor | None = None,
) -> Tensor:
    """`y = select(x) W^T + (x - select(x)) V U^T + bias`; a row of y depends on that row of x alone.

    `x[..., K]`, `weight[K, N]` (input-major), `parts`: output sizes of the fused parts, by default one of N. Every
    product is formed in x's dtype. `masked=False` uses all inputs, and so no branch: a dense prefill. `cuts`: see
    `selected`.
    """
    x_ = x.reshape(-1, x.shape[-1])
    weight = weight.to(x.dtype)
    if not masked:
        y = x_ @ weight
    else:
        blocks = []
        for part, columns in part_columns(parts or (weight.shape[1],)):
            used = selected(x_, selection, part, cuts)
            block = torch.where(used, x_, 0) @ weight[:, columns]
            if selection.V is not None and selection.U is not None:
                rest = torch.where(used, 0, x_) @ selection.V[part].to(x.dtype)
                block = block + rest @ selection.U[columns].to(x.dtype).T
            blocks.append(block)
        y = torch.cat(blocks, dim=-1)
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(x.dtype)


def selected(x: Tensor, selection: InputSelection, part: int, cuts: Tensor | None = None) -> Tensor:
    """bool `[M, K]`: the inputs of `x[M, K]` that fused part `part` reads. Scores are fp32; NaN counts as selected.

    `cuts` `[M, P]`: the tokens' thresholds, where they are known; see `token_cuts`.
    """
    score = scores(x, selection, part)
    if cuts is not None:
        return ~(score <= cuts[:, part, None])
    if selection.counts is not None:
        count = 1 if selection.counts.is_meta else int(selection.counts[part])  # meta tensors are of no content
        return ~(score <= token_cuts(score, count))
    assert selection.thresholds is not None  # it has these or counts
    return ~(score <= from_bits(selection.thresholds)[part])


def scores(x: Tensor, selection: InputSelection, part: int) -> Tensor:
    """fp32 `[M, K]`: what the inputs of `x[M, K]` are worth to fused part `part`."""
    score = x.float().abs()
    return score if selection.norms is None else score * from_bits(selection.norms)[part]


def token_cuts(score: Tensor, count: int) -> Tensor:
    """fp32 `[M, 1]`: for each token of `score` `[M, K]` (fp32, >= 0 or NaN), the largest number below its `count`-th
    largest score, so that `count` scores, and those equal to the last of them, are above it; 0 at least, so that a
    score of 0 is not. NaN counts as the largest.
    """
    bits = score.view(torch.int32) & SIGNLESS  # infinity times a norm of 0 may be a negative NaN
    last = bits.kthvalue(bits.shape[1] - count + 1, dim=1, keepdim=True).values
    return (last.clamp(1, INFINITY) - 1).view(torch.float32)


def part_columns(parts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """`(part, its output columns)` of fused parts with these sizes."""
    start = 0
    for part, size in enumerate(parts):
        yield part, slice(start, start + size)
        start += size
