"""Which groups to keep: masks from group scores, and the choice that a sweep makes block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..masks import nm_mask, top_mask
from ..sweep import Choose, Span
from .config import GQSAConfig


def group_mask(score: Tensor, kept: Tensor, segment: Tensor | None) -> Tensor:
    """Keep the groups of highest `score` `[N, J]`.

    `segment` int64 `[J]` is each group's segment, and each row keeps `kept` `[N, S]` groups in each; without it `kept`
    `[]` counts over all rows. Ties keep the lower index.
    """
    if segment is None:
        return top_mask(score.reshape(1, -1), int(kept)).view_as(score)
    mask = torch.zeros_like(score, dtype=torch.bool)
    for number in range(kept.shape[1]):
        members = (segment == number).nonzero()[:, 0]
        order = score[:, members].argsort(dim=1, descending=True, stable=True)
        first = torch.arange(len(members), device=score.device) < kept[:, number, None]
        mask[:, members] = torch.zeros_like(first.expand_as(order)).scatter(1, order, first.expand_as(order))
    return mask


def budget(config: GQSAConfig, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Groups to keep, and the segment of each group, as `group_mask` takes them, for a linear of `shape` `(N, K)`."""
    kept = config.kept_groups(shape)
    if config.balance == "layer":
        return torch.tensor(kept, device=device), None
    total = -(-shape[1] // config.group_size)
    segments = config.segments if config.segments != "auto" else 1
    segment = torch.arange(total, device=device) * segments // total
    return torch.full((shape[0], segments), kept // segments, device=device), segment


def group_sums(score: Tensor, size: int) -> Tensor:
    """Sums `[N, J]` over groups of `size` columns of `score` `[N, K]`."""
    return pad(score, (0, -score.shape[1] % size)).unflatten(1, (-1, size)).sum(-1)


def spread_groups(mask: Tensor, size: int, columns: int) -> Tensor:
    """Group mask `[N, J]` -> column mask `[N, K]` with K = `columns`."""
    return mask.repeat_interleave(size, dim=1)[:, :columns]


def fixed(mask: Tensor, order: Tensor) -> Choose:
    """The choice of a `mask` `[N, K]` made before."""
    columns = mask.T[order]
    return lambda free, start, stop: columns[start:stop]


def by_pattern(score_of: Callable[[Tensor, int], Tensor], nm: tuple[int, int]) -> Choose:
    """N:M masks of a whole block, from the scores of its weights as the sweep finds them."""

    def choose(free: Tensor, start: int, stop: int) -> Tensor:
        return nm_mask(score_of(free[: stop - start], start).T, *nm).T

    return choose


def of_outputs(kept: int, group_size: int) -> Choose:
    """Masks that keep the `kept` groups of outputs with the largest sums of squares of every column.

    All weights of a column lie in different rows and cost the same per square, so this is exact optimal brain surgeon.
    """

    def choose(free: Tensor, start: int, stop: int) -> Tensor:
        block = free[: stop - start]
        mask = top_mask(group_sums(block.square(), group_size), kept)
        return spread_groups(mask, group_size, block.shape[1])

    return choose


class GroupChoice:
    """A choice of groups: at each block it ranks all free groups, and fixes what that means for the block's own.

    What a later block keeps is decided when the sweep gets there, with what is left of each row's budget.
    """

    def __init__(
        self, score_of: Callable[[Tensor, int], Tensor], spans: list[Span], kept: Tensor, segment: Tensor | None
    ) -> None:
        """`score_of(free [., N], start)` scores the groups of the spans from position `start` on, `[spans, N]`."""
        self.score_of, self.spans, self.left, self.segment = score_of, spans, kept.clone(), segment

    def __call__(self, free: Tensor, start: int, stop: int) -> Tensor:
        ahead = [span for span in self.spans if span.start >= start]
        numbers = torch.tensor([span.group for span in ahead], device=free.device)
        segment = None if self.segment is None else self.segment[numbers]
        mask = group_mask(self.score_of(free, start).T, self.left, segment)
        mine = [span for span in ahead if span.stop <= stop]
        decided = mask[:, : len(mine)]
        if segment is None:
            self.left -= decided.sum()
        else:
            self.left -= torch.stack(
                [decided[:, segment[: len(mine)] == number].sum(1) for number in range(self.left.shape[1])], dim=1
            )
        sizes = torch.tensor([span.stop - span.start for span in mine], device=free.device)
        return decided.T.repeat_interleave(sizes, dim=0)


def additive_scores(weights: Tensor, spans: list[Span]) -> Callable[[Tensor, int], Tensor]:
    """Scores of groups as sums of squared weights times `weights` `[K]` (in the sweep's order)."""

    def score(free: Tensor, start: int) -> Tensor:
        squares = free.square() * weights[start:, None]
        bounds = [span for span in spans if span.start >= start]
        return torch.stack([squares[span.start - start : span.stop - start].sum(0) for span in bounds])

    return score


class GroupSurgeon:
    """Scores of groups by exact optimal brain surgeon: removing group g costs w_g ([H^-1]_gg)^-1 w_g^T.

    H is the Hessian of the free columns, so the blocks of its inverse shrink as the sweep moves on: with U its upper
    factor they lose U_dg^T U_dg for the columns d that were done.
    """

    def __init__(self, upper: Tensor, spans: list[Span]) -> None:
        self.upper, self.spans, self.done = upper, spans, 0
        self.size = max(span.stop - span.start for span in spans)
        self.blocks = upper.new_zeros((len(spans), self.size, self.size))
        for block, span in zip(self.blocks, spans, strict=True):
            piece = upper[: span.stop, span.start : span.stop]
            width = span.stop - span.start
            block[:width, :width] = piece.T @ piece
            block.diagonal()[width:] = 1

    def __call__(self, free: Tensor, start: int) -> Tensor:
        first = next(i for i, span in enumerate(self.spans) if span.start >= start)
        groups = free.new_zeros((len(self.spans) - first, self.size, free.shape[1]))
        for i, span in enumerate(self.spans[first:]):
            width = span.stop - span.start
            piece = self.upper[self.done : start, span.start : span.stop]
            self.blocks[first + i, :width, :width] -= piece.T @ piece
            groups[i, :width] = free[span.start - start : span.stop - start]
        self.done = start
        factor = torch.linalg.cholesky(self.blocks[first:])
        return torch.linalg.solve_triangular(factor, groups, upper=False).square_().sum(1)
