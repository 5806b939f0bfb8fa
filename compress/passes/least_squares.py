"""The best weights on a mask that is already chosen (as in ALPS, Meng et al. 2024, arXiv 2406.07831)."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(start: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, damping: float, steps: int) -> Tensor:
    """`start` after `steps` conjugate-gradient steps towards the least squares on `mask`, exactly zero off it.

    Minimises tr((V - target) (hessian + damping * mean(diag) I) (V - target)^T). `start`, `target` and `mask` are
    `[N, K]`; `hessian` `[K, K]` is overwritten, and has a positive diagonal.
    """
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    norm = hessian.diagonal().sqrt()  # in coordinates where the diagonal is one, few steps are enough
    hessian.div_(norm).div_(norm[:, None])
    return conjugate_gradient(start * norm, target * norm, hessian, mask, steps).div_(norm).masked_fill_(~mask, 0.0)


def conjugate_gradient(start: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Minimise tr((V - target) hessian (V - target)^T) over V supported on `mask`, from `start`; rows are independent.

    `start`, `target`, `mask` are `[N, K]`, `hessian` `[K, K]` has a near-unit diagonal, so no preconditioner is needed.
    """
    solution = start.clone()
    residual = ((target - solution) @ hessian).mul_(mask)
    direction = residual.clone()
    power = residual.square().sum(1, keepdim=True)
    # A row this close is solved; going on would divide one rounding error by another.
    done = power * torch.finfo(power.dtype).eps ** 2
    for _ in range(steps):
        product = (direction @ hessian).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(power > done, power / curvature, 0.0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        fresh = residual.square().sum(1, keepdim=True)
        direction.mul_(fresh / power).add_(residual).masked_fill_(power <= done, 0.0)
        power = torch.where(power > done, fresh, 0.0)
    return solution
