"""One optimal-brain-surgeon sweep that prunes and quantizes: GPTQ (Frantar et al. 2022, arXiv 2210.17323) with masks.

Columns are visited in a fixed order. With U the upper Cholesky factor of the inverse Hessian in that order, changing
weight w of column i to v costs ((w - v) / U_ii)^2, and (w - v) / U_ii along U's row i is the optimal correction of the
columns that are still free. Whether v is zero (pruned) or a point of the group's grid (kept and quantized) makes no
difference to that, so one sweep feeds both errors forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .quantization import CodeRange, Grid, find_grids, grid_values, round_to_grid

# Chooses the kept columns of positions `start` to `stop` from the still free `columns[start:]` `[., N]`: a bool mask.
Choose = Callable[[Tensor, int, int], Tensor]


class Span(NamedTuple):
    """Positions `start` to `stop` of the sweep hold the columns of quantization group `group`."""

    start: int
    stop: int
    group: int


class Swept(NamedTuple):
    """Result in the original column order: `weight`, `codes` (fp32 whole numbers), `mask` `[N, K]`, `grid` `[N, J]`."""

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
    choose: Choose | None = None,
) -> Swept:
    """Prune (where `choose` says so) and quantize `weight` `[N, K]` fp32 with both errors fed forward.

    `order` and `spans` come from `group_order`; `upper` `[K, K]` is the factor of the inverse Hessian in that order.
    """
    # Columns are rows here, so that each step of the sweep works on contiguous memory.
    columns = weight.T[order].contiguous()
    rows, scale = columns.shape[1], upper.diagonal()
    rounded = torch.empty_like(columns)
    kept = torch.ones_like(columns, dtype=torch.bool)
    grids = Grid(*columns.new_empty(2, len(spans), rows).unbind(0))
    pending = {span.start: span for span in spans}
    grid = grids
    for start, stop in blocks_of(spans, block_size):
        if choose is not None:
            kept[start:stop] = choose(columns[start:], start, stop)
        block, errors = columns[start:stop].clone(), torch.empty_like(columns[start:stop])
        for i in range(stop - start):
            position = start + i
            if position in pending:
                span = pending[position]
                inside = (block if span.stop <= stop else columns[start:])[i : i + span.stop - span.start]
                if choose is not None and span.stop <= stop:
                    inside = inside * kept[position : span.stop]
                weights = scale[position : span.stop].reciprocal().square()
                grid = find_grids(inside.T, weights, codes, candidates)
                grids.scales[span.group], grids.zeros[span.group] = grid
            code = round_to_grid(block[i], grid, codes)
            value = grid_values(code, grid)
            if choose is not None:
                value *= kept[position]
                code = torch.where(kept[position], code, grid.zeros)
            error = (block[i] - value) / scale[position]
            block[i + 1 :].addr_(upper[position, position + 1 : stop], error, alpha=-1)
            block[i], rounded[position], errors[i] = value, code, error
        columns[start:stop] = block
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Swept(
        columns[back].T.contiguous(),
        rounded[back].T.contiguous(),
        kept[back].T.contiguous(),
        Grid(grids.scales.T.contiguous(), grids.zeros.T.contiguous()),
    )
