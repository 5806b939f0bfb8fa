"""Integer grids: which scale and zero point each group of weights gets, and rounding to them.

A group's grid is `scale * (code - zero)` with an fp16 scale, exactly as it is stored, and an integer zero point, so
that 0 is a point of every grid and a pruned weight stays exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...triton_kernels.formats.integers import Quantized

# The search narrows a group's range from min-max to this fraction of it.
_NARROWEST = 0.4
# Floats worked on at a time: what stays in a processor's cache.
_CACHED = 2**16
_CACHED_TRIALS = 2**18
_SMALLEST = 2.0**-24  # the smallest positive fp16 number


@dataclass(frozen=True)
class CodeRange:
    """The codes a grid may use, `low` to `high`; `zero` is the zero point of symmetric grids, None for asymmetric.

    3-bit and 2-bit codes are stored in 4 bits: symmetric ones around the stored zero point, 8.
    """

    low: int
    high: int
    zero: int | None

    @classmethod
    def of(cls, bits: int, symmetric: bool) -> CodeRange:
        """Range of `bits`-bit codes (2, 3, 4 or 8)."""
        if not symmetric:
            return cls(0, 2**bits - 1, None)
        zero = 8 if bits <= 4 else 128
        return cls(zero - 2 ** (bits - 1), zero + 2 ** (bits - 1) - 1, zero)


class Grid(NamedTuple):
    """`scales` fp32 (fp16 numbers, >= 0) and `zeros` fp32 (whole numbers) of groups, both `[...]`."""

    scales: Tensor
    zeros: Tensor


def round_to_grid(weight: Tensor, grid: Grid, codes: CodeRange) -> Tensor:
    """Nearest codes, fp32 whole numbers, of `weight`; `grid` must broadcast against it. At a zero scale, any code."""
    return (weight / grid.scales.clamp_min(_SMALLEST)).add_(grid.zeros).round_().clamp_(codes.low, codes.high)


def grid_values(codes: Tensor, grid: Grid) -> Tensor:
    """Exact fp32 values of `codes`; `grid` must broadcast against them."""
    return (codes - grid.zeros) * grid.scales


def find_grids(weight: Tensor, importance: Tensor | None, codes: CodeRange, candidates: int) -> Grid:
    """The grid of each group `weight` `[..., G]` (fp32) that costs least: sum of importance * (rounded - weight)^2.

    Tries `candidates` ranges from min-max down to 0.4 of it, then shifts the zero point and fits the scale to the
    rounded codes by least squares. With one candidate the answer is min-max. `importance` broadcasts against `weight`.
    """
    low, high = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
    if codes.zero is None:
        width = (high - low) / (codes.high - codes.low)
        zeros = torch.where(width > 0, low.abs() / width, 0.0).round_().clamp_(codes.low, codes.high)
    else:
        width = torch.maximum(low.abs() / (codes.zero - codes.low), high / (codes.high - codes.zero))
        zeros = torch.full_like(width, codes.zero)
    if candidates == 1:
        return Grid(as_fp16(width), zeros)
    together = max(1, _CACHED_TRIALS // max(1, weight.numel()))
    shares = torch.linspace(1, _NARROWEST, candidates, device=weight.device).view(-1, *(1,) * width.dim())
    best = None
    for part in shares.split(together):
        scales = as_fp16(width * part)
        best = _cheapest(weight, importance, Grid(scales, zeros.expand_as(scales)), codes, best)
    assert best is not None
    shifts = torch.tensor((0,) if codes.zero is not None else (0, -1, 1), device=weight.device)
    start = best.grid
    for part in shifts.view(-1, *(1,) * width.dim()).split(together):
        shifted = (start.zeros + part).clamp_(codes.low, codes.high)
        trials = Grid(start.scales.expand_as(shifted), shifted)
        for _ in range(2):
            trials = _fit_scale(weight, importance, trials, codes)
            best = _cheapest(weight, importance, trials, codes, best)
    return best.grid


def as_fp16(scales: Tensor) -> Tensor:
    """`scales` rounded to fp16, as fp32."""
    return scales.half().float()


def split_groups(columns: Tensor, group_size: int) -> Tensor:
    """`[..., C]` -> `[..., J, G]`; a short last group is padded with zeros."""
    return pad(columns, (0, -columns.shape[-1] % group_size)).unflatten(-1, (-1, group_size))


def spread_grid(grid: Grid, group_size: int, columns: int) -> Grid:
    """The grid `[..., C]` of each of C = `columns` from grids `[..., J]` of their groups."""
    group = torch.arange(columns, device=grid.scales.device) // group_size
    return Grid(grid.scales[..., group], grid.zeros[..., group])


def quantize(
    weight: Tensor, importance: Tensor | None, codes: CodeRange, group_size: int, candidates: int
) -> tuple[Quantized, Tensor]:
    """Round-to-nearest of `weight` `[N, K]` fp32 on searched grids; also the exact values `[N, K]` fp32.

    `importance` `[K]` weighs the search's errors (None: all alike).
    """
    size = weight.shape[-1]
    groups = split_groups(weight, group_size)
    per_group = None if importance is None else split_groups(importance, group_size)
    rows = max(1, _CACHED // weight[0].numel())
    found = [find_grids(part, per_group, codes, candidates) for part in groups.split(rows)]
    grid = Grid(torch.cat([part.scales for part in found]), torch.cat([part.zeros for part in found]))
    wide = Grid(grid.scales[..., None], grid.zeros[..., None])
    rounded = round_to_grid(groups, wide, codes)
    values = grid_values(rounded, wide)
    return as_quantized(rounded.flatten(-2)[..., :size], grid, codes), values.flatten(-2)[..., :size].contiguous()


def as_quantized(codes: Tensor, grid: Grid, allowed: CodeRange) -> Quantized:
    """Codes `[R, C]` and grids `[R, J]` as the formats take them; symmetric grids have no zeros."""
    zeros = grid.zeros.to(torch.uint8) if allowed.zero is None else None
    return Quantized(codes.to(torch.uint8).contiguous(), grid.scales.half(), zeros)


def _in_steps(weight: Tensor, grid: Grid, codes: CodeRange) -> tuple[Tensor, Tensor]:
    """`weight` in steps of its grid, and rounded to whole steps the grid has; shifting by the zero point is saved."""
    steps = weight / grid.scales.clamp_min(_SMALLEST)[..., None]
    low, high = ((bound - grid.zeros)[..., None] for bound in (codes.low, codes.high))
    return steps, steps.round().clamp_(low, high)


def _cost(weight: Tensor, importance: Tensor | None, grid: Grid, codes: CodeRange) -> Tensor:
    """Sum of importance * (rounded - weight)^2 per group; infinite for a zero scale, so that it never wins."""
    steps, rounded = _in_steps(weight, grid, codes)
    error = rounded.sub_(steps).square_()
    lost = error.sum(-1) if importance is None else error.mul_(importance).sum(-1)
    return torch.where(grid.scales > 0, lost * grid.scales.square(), torch.inf)


def _fit_scale(weight: Tensor, importance: Tensor | None, grid: Grid, codes: CodeRange) -> Grid:
    """The least-squares scale for the codes that `grid` gives."""
    _, rounded = _in_steps(weight, grid, codes)
    weighed = rounded if importance is None else rounded * importance
    power = (weighed * rounded).sum(-1)
    return grid._replace(scales=as_fp16(torch.where(power > 0, (weighed * weight).sum(-1) / power, 0.0).clamp_(min=0)))


class _Costed(NamedTuple):
    """A grid of each group and what it costs, both `[...]`."""

    grid: Grid
    cost: Tensor


def _cheapest(
    weight: Tensor, importance: Tensor | None, trials: Grid, codes: CodeRange, best: _Costed | None
) -> _Costed:
    """The cheapest for each group of `best` and the `trials` `[T, ...]`; the earlier of equals."""
    costs = _cost(weight, importance, trials, codes)
    cost, index = costs.min(0)
    found = Grid(*(part.gather(0, index[None])[0] for part in trials))
    if best is None:
        return _Costed(found, cost)
    wins = cost < best.cost
    grid = Grid(*(torch.where(wins, *pair) for pair in zip(found, best.grid, strict=True)))
    return _Costed(grid, cost.minimum(best.cost))
