"""One optimal-brain-surgeon sweep that prunes and quantizes: GPTQ (Frantar et al. 2022, arXiv 2210.17323) with masks.

Columns are visited in a fixed order. With U the upper Cholesky factor of the inverse Hessian in that order, changing
weight w of column i to v costs ((w - v) / U_ii)^2, and (w - v) / U_ii along U's row i is the optimal correction of the
columns that are still free. Whether v is zero (pruned) or a point of the group's grid (kept and quantized) makes no
difference to that, so one sweep feeds both errors forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .quantization import CodeRange, Grid, find_grids, grid_values, round_to_grid, split_groups, spread_grid

# Chooses the kept columns of positions `start` to `stop` from the still free `columns[start:]` `[., N]`: a bool mask.
Choose = Callable[[Tensor, int, int], Tensor]


class Span(NamedTuple):
    """Positions `start` to `stop` of the sweep hold the columns of quantization group `group`."""

    start: int
    stop: int
    group: int


class Swept(NamedTuple):
    """Result in the original column order: `weight`, `codes` (fp32 whole numbers) and `mask` `[N, K]`; `grid` `[N, J]`,
    or `[K, J]` of groups along the outputs."""

    weight: Tensor
    codes: Tensor
    mask: Tensor
    grid: Grid


def group_order(importance: Tensor, group_size: int, sort: bool, inside: bool = False) -> tuple[Tensor, list[Span]]:
    """Column order int64 `[K]` of a sweep, and its spans.

    With `sort` the groups with the largest mean `importance` `[K]` come first, and with `inside` so do the largest
    columns of a group; groups stay whole, because a grid is found when the sweep reaches its group.
    """
    size = len(importance)
    bounds = [(start, min(start + group_size, size)) for start in range(0, size, group_size)]
    numbers = list(range(len(bounds)))
    if sort:
        means = torch.stack([importance[start:stop].mean() for start, stop in bounds])
        numbers = means.argsort(descending=True, stable=True).tolist()
    order, spans, position = [], [], 0
    for number in numbers:
        start, stop = bounds[number]
        members = torch.arange(start, stop, device=importance.device)
        if sort and inside:
            members = members[importance[start:stop].argsort(descending=True, stable=True)]
        order.append(members)
        spans.append(Span(position, position + stop - start, number))
        position += stop - start
    return torch.cat(order), spans


def blocks_of(spans: Sequence[Span], block_size: int) -> list[tuple[int, int]]:
    """Blocks of about `block_size` positions whose borders never fall inside a smaller span; large spans are cut."""
    blocks: list[tuple[int, int]] = []
    begin = 0
    for span in spans:
        if span.stop - begin > block_size:
            if span.start > begin:
                blocks.append((begin, span.start))
                begin = span.start
            while span.stop - begin > block_size:
                blocks.append((begin, begin + block_size))
                begin += block_size
    if spans and begin < spans[-1].stop:
        blocks.append((begin, spans[-1].stop))
    return blocks


def sweep(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    spans: Sequence[Span],
    *,
    codes: CodeRange,
    candidates: int,
    block_size: int,
    outputs: int | None = None,
    choose: Choose | None = None,
) -> Swept:
    """Prune (where `choose` says so) and quantize `weight` `[N, K]` fp32 with both errors fed forward.

    `order` and `spans` come from `group_order`; `upper` `[K, K]` is the factor of the inverse Hessian in that order.
    With `outputs`, a group is that many outputs of one input, and every span one column.
    """
    # Columns are rows here, so that each step of the sweep works on contiguous memory.
    columns = weight.T[order].contiguous()
    scale = upper.diagonal()
    rounded = torch.empty_like(columns)
    kept = torch.ones_like(columns, dtype=torch.bool)
    grids: _Grids
    if outputs is None:
        grids = _InputGroups(columns.shape[1], spans, scale, codes, candidates)
    else:
        grids = _OutputGroups(columns.shape, outputs, codes, candidates, columns.device)
    for start, stop in blocks_of(spans, block_size):
        if choose is not None:
            kept[start:stop] = choose(columns[start:], start, stop)
        block, errors = columns[start:stop].clone(), torch.empty_like(columns[start:stop])
        for i in range(stop - start):
            position = start + i
            grid = grids.of_column(position, block, columns, kept, start)
            code = round_to_grid(block[i], grid, codes)
            if choose is not None:
                code = torch.where(kept[position], code, grid.zeros)
            value = grid_values(code, grid)
            error = (block[i] - value) / scale[position]
            block[i + 1 :].addr_(upper[position, position + 1 : stop], error, alpha=-1)
            block[i], rounded[position], errors[i] = value, code, error
        columns[start:stop] = block
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Swept(
        columns[back].T.contiguous(), rounded[back].T.contiguous(), kept[back].T.contiguous(), grids.found(back)
    )


class _Grids(Protocol):
    """The grids of a sweep, found on the way, when the columns already carry the corrections of those before."""

    def of_column(self, position: int, block: Tensor, columns: Tensor, kept: Tensor, start: int) -> Grid:
        """Grid `[N]` of the column at `position`, the positions being asked for in order.

        `block` holds the columns from `start` on as they are now; `columns` `[K, N]` all, as they were when the block
        began, and `kept` `[K, N]` those that stay as far as the block goes.
        """

    def found(self, back: Tensor) -> Grid:
        """All grids in their original order, to which `back` `[K]` takes positions."""


class _InputGroups:
    """A grid per row for each span, found at its first column with what an error in each column will cost."""

    def __init__(self, rows: int, spans: Sequence[Span], scale: Tensor, codes: CodeRange, candidates: int) -> None:
        self.scale, self.codes, self.candidates = scale, codes, candidates
        self.pending = {span.start: span for span in spans}
        empty = scale.new_zeros(len(spans), rows)
        self.grids = Grid(empty, torch.full_like(empty, codes.zero or 0))
        self.current = self.grids

    def of_column(self, position: int, block: Tensor, columns: Tensor, kept: Tensor, start: int) -> Grid:
        span = self.pending.get(position)
        if span is None:
            return self.current
        if span.stop <= start + len(block):
            stays = kept[span.start : span.stop]
            inside, rows = block[span.start - start : span.stop - start] * stays, stays.any(0).nonzero()[:, 0]
        else:  # only the first block of a large span has begun, and nothing in it has changed
            inside, rows = columns[span.start : span.stop], None
        importance = self.scale[span.start : span.stop].reciprocal().square()
        self.current = Grid(self.grids.scales[span.group], self.grids.zeros[span.group])
        if rows is None or len(rows) == inside.shape[1]:
            found = find_grids(inside.T, importance, self.codes, self.candidates)
            self.current.scales.copy_(found.scales)
            self.current.zeros.copy_(found.zeros)
        else:  # groups pruned whole keep the grid of zeros
            found = find_grids(inside[:, rows].T, importance, self.codes, self.candidates)
            self.current.scales[rows], self.current.zeros[rows] = found
        return self.current

    def found(self, back: Tensor) -> Grid:
        return Grid(self.grids.scales.T.contiguous(), self.grids.zeros.T.contiguous())


class _OutputGroups:
    """Grids of groups of outputs for every column: found when its block begins, many at once, because one column holds
    too few groups to be worth a search of its own."""

    def __init__(self, shape: torch.Size, size: int, codes: CodeRange, candidates: int, device: torch.device) -> None:
        self.rows, self.size, self.codes, self.candidates = shape[1], size, codes, candidates
        self.grids = Grid(*torch.empty(2, shape[0], -(-shape[1] // size), device=device).unbind(0))
        self.block = self.grids

    def of_column(self, position: int, block: Tensor, columns: Tensor, kept: Tensor, start: int) -> Grid:
        if position == start:
            stop = start + len(block)
            inside = split_groups(block * kept[start:stop], self.size)
            grid = find_grids(inside, None, self.codes, self.candidates)
            self.grids.scales[start:stop], self.grids.zeros[start:stop] = grid
            self.block = spread_grid(grid, self.size, self.rows)
        return Grid(self.block.scales[position - start], self.block.zeros[position - start])

    def found(self, back: Tensor) -> Grid:
        return Grid(self.grids.scales[back], self.grids.zeros[back])
