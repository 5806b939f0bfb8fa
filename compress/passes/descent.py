"""Coordinate descent over integer codes and scales (as in QuantEase, Behdin et al. 2023, arXiv 2309.01885).

Minimises tr((Q - W) H (Q - W)^T) over Q on the grids and mask that a sweep left. Unlike the sweep, which can only
correct columns it has not visited, every column sees the errors of all others, and a pruned weight takes no part. No
step raises the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .quantization import CodeRange, Grid, as_fp16, grid_values, round_to_grid, split_groups, spread_grid

_BLOCK = 64  # columns between updates of all gradients, with groups along the outputs


class Descended(NamedTuple):
    """`codes` `[N, K]` (fp32 whole numbers), their `grid`, and tr((Q - W) H (Q - W)^T) `before` and `after`."""

    codes: Tensor
    grid: Grid
    before: float
    after: float


def descend(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    mask: Tensor | None,
    *,
    allowed: CodeRange,
    group_size: int,
    rounds: int,
    along_outputs: bool = False,
) -> Descended:
    """Better codes and grids (scales that fit fp16) after `rounds` passes.

    `weight` `[N, K]` is the target, `hessian` `[K, K]` positive definite, `mask` `[N, K]` the kept weights (None: all),
    whose codes outside are the zero point. Grids are `[N, J]`, or `[K, J]` with groups `along_outputs`.
    """
    rounded = codes.T.clone(memory_format=torch.contiguous_format)
    kept = None if mask is None else mask.T.contiguous()
    size, rows = rounded.shape
    if along_outputs:
        scales, zeros, step = grid.scales.clone(), grid.zeros, _BLOCK
        current = grid_values(rounded, spread_grid(grid, group_size, rows))
    else:
        scales, zeros, step = grid.scales.T.clone(memory_format=torch.contiguous_format), grid.zeros.T, group_size
        spread = torch.arange(size, device=codes.device) // group_size
        current = grid_values(rounded, Grid(scales[spread], zeros[spread]))
    # Half the negative gradient; what is left of it at the end of a block is all that moved inside it.
    missing = weight.T - current
    residual = hessian @ missing
    before = _inner(missing, residual)
    diagonal = hessian.diagonal()
    for _ in range(rounds):
        for group, start in enumerate(range(0, size, step)):
            stop = min(start + step, size)
            inside = hessian[start:stop, start:stop]
            begun, pull = current[start:stop].clone(), residual[start:stop].clone()
            if not along_outputs:
                direction = rounded[start:stop] - zeros[group]
                along = inside @ direction
                change = _scale_step(scales[group], (direction * pull).sum(0), (direction * along).sum(0))
                scales[group] += change
                pull.sub_(along.mul_(change))
                current[start:stop] = direction * scales[group]
                local = Grid(scales[group], zeros[group])
            for i in range(stop - start):
                column = start + i
                if along_outputs:
                    local = spread_grid(Grid(scales[column], zeros[column]), group_size, rows)
                    direction = rounded[column] - local.zeros
                    slope, power = _group_sums(torch.stack([direction * pull[i], direction.square()]), group_size)
                    scales[column] += _scale_step(scales[column], slope, power * diagonal[column])
                    local = spread_grid(Grid(scales[column], zeros[column]), group_size, rows)
                code = round_to_grid(current[column] + pull[i] / diagonal[column], local, allowed)
                if kept is not None:
                    code = torch.where(kept[column], code, local.zeros)
                moved = grid_values(code, local) - current[column]
                pull.addr_(inside[:, i], moved, alpha=-1)
                current[column] += moved
                rounded[column] = code
            residual.addmm_(hessian[:, start:stop], current[start:stop] - begun, alpha=-1)
    found = Grid(scales, zeros) if along_outputs else Grid(scales.T.contiguous(), zeros.T.contiguous())
    return Descended(rounded.T.contiguous(), found, before, _inner(weight.T - current, residual))


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.vdot(a.flatten(), b.flatten()))


def _scale_step(scales: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Least squares along fixed codes: the change of `scales` to the nearest fp16 number that lowers the error, or 0.

    A change s of a scale changes its error by s * (s * curvature - 2 * slope).
    """
    wanted = as_fp16((scales + torch.where(curvature > 0, slope / curvature, 0.0)).clamp_(min=0))
    change = wanted - scales
    return torch.where(change * (2 * slope - change * curvature) > 0, change, 0.0)


def _group_sums(values: Tensor, group_size: int) -> Tensor:
    """Sums `[..., J]` over groups of `values` `[..., C]`."""
    return split_groups(values, group_size).sum(-1)
