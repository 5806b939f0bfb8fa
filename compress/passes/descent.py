"""Coordinate descent over integer codes and scales (as in QuantEase, Behdin et al. 2023, arXiv 2309.01885).

Minimises tr((Q - W) H (Q - W)^T) over Q on the grids and mask that a sweep left. Unlike the sweep, which can only
correct columns it has not visited, every column sees the errors of all others, and a pruned weight takes no part. No
step raises the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import CodeRange, Grid, as_fp16, grid_values, round_to_grid


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
) -> tuple[Tensor, Grid]:
    """Better codes `[N, K]` and grids `[N, J]` (fp32 whole numbers; scales that fit fp16), after `rounds` passes.

    `weight` `[N, K]` is the target, `hessian` `[K, K]` positive definite, `mask` `[N, K]` the kept weights (None: all),
    whose codes outside are the zero point.
    """
    rounded, scales, zeros = codes.T.contiguous(), grid.scales.T.contiguous(), grid.zeros.T.contiguous()
    kept = None if mask is None else mask.T.contiguous()
    size = len(rounded)
    spread = torch.arange(size, device=codes.device) // group_size
    current = grid_values(rounded, Grid(scales[spread], zeros[spread]))
    # Half the negative gradient; what is left of it at the end of a block is all that moved inside it.
    residual = hessian @ (weight.T - current)
    diagonal = hessian.diagonal()
    for _ in range(rounds):
        for group, start in enumerate(range(0, size, group_size)):
            stop = min(start + group_size, size)
            inside = hessian[start:stop, start:stop]
            before, pull = current[start:stop].clone(), residual[start:stop].clone()
            # The scale first: least squares along the codes.
            direction = rounded[start:stop] - zeros[group]
            along = inside @ direction
            curvature = (direction * along).sum(0)
            slope = (direction * pull).sum(0)
            wanted = as_fp16((scales[group] + torch.where(curvature > 0, slope / curvature, 0.0)).clamp_(min=0))
            step = wanted - scales[group]
            step = torch.where(step * (2 * slope - step * curvature) > 0, step, 0.0)
            scales[group] += step
            pull.sub_(along.mul_(step))
            current[start:stop] = direction * scales[group]
            local = Grid(scales[group], zeros[group])
            for i in range(stop - start):
                column = start + i
                code = round_to_grid(current[column] + pull[i] / diagonal[column], local, allowed)
                if kept is not None:
                    code = torch.where(kept[column], code, local.zeros)
                moved = grid_values(code, local) - current[column]
                pull.addr_(inside[:, i], moved, alpha=-1)
                current[column] += moved
                rounded[column] = code
            residual.addmm_(hessian[:, start:stop], current[start:stop] - before, alpha=-1)
    return rounded.T.contiguous(), Grid(scales.T.contiguous(), zeros.T.contiguous())
