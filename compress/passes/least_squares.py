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
    residual = ((target - start).mul_(norm) @ hessian).mul_(mask)
    return conjugate_gradient(residual, hessian, mask, steps).div_(norm).add_(start).masked_fill_(~mask, 0.0)


def conjugate_gradient(residual: Tensor, hessian: Tensor, mask: Tensor, steps: int) -> Tensor:
    """D `[N, K]`, zero off `mask`, with D hessian close to `residual` on it; rows are independent.

    `residual` `[N, K]` is zero off `mask` and overwritten; `hessian` `[K, K]` has a near-unit diagonal, so no
    preconditioner is needed. Memory is three more arrays like `residual`.
    """
    solution = torch.zeros_like(residual)
    direction = residual.clone()
    power = _row_products(residual, residual)
    # A row this close is solved; going on would divide one rounding error by another.
    done = power * torch.finfo(power.dtype).eps ** 2
    for _ in range(steps):
        product = (direction @ hessian).mul_(mask)
        step = torch.where(power > done, power / _row_products(direction, product), 0.0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        fresh = _row_products(residual, residual)
        direction.mul_(fresh / power).add_(residual).masked_fill_(power <= done, 0.0)
        power = torch.where(power > done, fresh, 0.0)
    return solution


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products `[N, 1]` of the rows of `a` and `b` `[N, K]`."""
    return torch.linalg.vecdot(a, b)[:, None]
