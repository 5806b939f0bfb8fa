"""Factoring Hessians that calibration left singular, badly scaled or too small."""

from __future__ import annotations

import torch
from torch import Tensor


class HessianError(ValueError):
    """No damping made the Hessian positive definite; the driver adds the module's name and the token count."""


def revive_dead_inputs(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of `weight` `[N, K]`, and `hessian` `[K, K]`, in which inputs that were always zero are harmless.

    Their Hessian diagonal becomes the mean (in place: the caller's `hessian` is the one returned), their weights zero
    (they contribute nothing, so the pattern should drop them first). Also returns the bool mask `[K]` of those inputs.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.any()):
        diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones(())
    return weight.masked_fill(dead, 0.0), hessian, dead


def all_finite(values: Tensor) -> bool:
    """Whether no entry is infinite or NaN. `torch.isfinite` would hold two more such tensors."""
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def damped_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of `hessian + lambda * mean(diag) * I` and the lambda that worked.

    Starts at `damping` and multiplies by ten, at most four times; raises HessianError after that. The damping is added
    in place and taken back, because at a large K one more copy is what a run's peak memory is made of.
    """
    if not all_finite(hessian):
        raise HessianError("the Hessian has non-finite entries; try --dtype float32 or other calibration text")
    diagonal = hessian.diagonal().clone()
    try:
        for attempt in range(5):
            level = damping * 10**attempt
            hessian.diagonal().copy_(diagonal + level * diagonal.mean())
            factor, info = torch.linalg.cholesky_ex(hessian)
            # Every entry goes into the pivot of its row, so one that is not finite shows on the diagonal.
            if int(info) == 0 and all_finite(factor.diagonal()):
                return factor, level
    finally:
        hessian.diagonal().copy_(diagonal)
    raise HessianError(
        f"the Hessian is not positive definite even with damping {level:g}; use more calibration samples or"
        " raise damping"
    )


def inverse_upper_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper-triangular U with `U^T U = (damped hessian)^-1`, as SparseGPT and GPTQ use it, and the damping.

    Overwrites `hessian` `[K, K]`: besides it, one more matrix of its size exists at a time.
    """
    # With rows and columns reversed, H = L L^T becomes H = R R^T with R upper triangular, and U is R's inverse: one
    # factorization, no explicit inverse that rounding could make indefinite.
    hessian.copy_(hessian.flip(0, 1))
    factor, level = damped_cholesky(hessian, damping)
    inverse = hessian.zero_()
    inverse.diagonal().fill_(1.0)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return inverse.flip(0, 1), level
