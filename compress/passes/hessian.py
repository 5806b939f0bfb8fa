"""Factoring Hessians that calibration left singular, badly scaled or too small."""

from __future__ import annotations

import torch
from torch import Tensor


class HessianError(ValueError):
    """No damping made the Hessian positive definite; the driver adds the module's name and the token count."""


def revive_dead_inputs(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of `weight` `[N, K]` and `hessian` `[K, K]` in which inputs that were always zero are harmless.

    Their Hessian diagonal becomes the mean, their weights zero (they contribute nothing, so the pattern should drop
    them first). Also returns the bool mask `[K]` of those inputs.
    """
    hessian, weight = hessian.clone(), weight.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.any()):
        mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones(())
        diagonal[dead] = mean
        weight[:, dead] = 0
    return weight, hessian, dead


def damped_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of `hessian + lambda * mean(diag) * I` and the lambda that worked.

    Starts at `damping` and multiplies by ten, at most four times; raises HessianError after that.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian has non-finite entries; try --dtype float32 or other calibration text")
    mean = hessian.diagonal().mean()
    for attempt in range(5):
        level = damping * 10**attempt
        damped = hessian.clone()
        damped.diagonal().add_(level * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            return factor, level
    raise HessianError(
        f"the Hessian is not positive definite even with damping {level:g}; use more calibration samples or"
        " raise damping"
    )


def inverse_upper_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper-triangular U with `U^T U = (damped hessian)^-1`, as SparseGPT and GPTQ use it, and the damping."""
    # With the columns reversed, H = L L^T becomes H = R R^T with R upper triangular, and U is its inverse: one
    # factorization, no explicit inverse that rounding could make indefinite.
    factor, level = damped_cholesky(hessian.flip(0, 1), damping)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True), level
