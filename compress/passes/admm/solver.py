"""ADMM pruning with gradual masks (Boza 2024, arXiv 2401.02938) and a conjugate-gradient finish (as in ALPS,
Meng et al. 2024, arXiv 2406.07831).

Minimise tr((V - W) H (V - W)^T) over V under the pattern, in coordinates where H has a unit diagonal:

    V <- (H + rho I)^-1 (H W + rho (Z - U)),   Z <- pattern(V + U),   U <- U + V - Z.

The pattern's density falls from 1 to its target along 1 - s (1 - (1 - t)^3) (Zhu & Gupta 2017, arXiv 1710.01878), so
that the weights have adapted before the last ones go.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..hessian import damped_cholesky, revive_dead_inputs
from ..least_squares import conjugate_gradient
from ..masks import pattern_mask
from .config import ADMMConfig, ADMMSettings


def solve(weight: Tensor, statistics: InputStatistics, config: ADMMConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 and the input Hessian `[K, K]` -> updated weights under the chosen mask.

    Raises HessianError when no damping makes the Hessian positive definite.
    """
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    pruned, mask, damping = least_squares(
        weight, hessian, config, lambda score, step: gradual_mask(score, config, step)
    )
    return PruneResult(pruned, mask, {"damping": damping})


def least_squares(
    weight: Tensor, hessian: Tensor, settings: ADMMSettings, choose: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Weights `[N, K]` exactly zero off their mask, the mask, and the damping used.

    `weight` `[N, K]`; `hessian` `[K, K]` has a positive diagonal and is overwritten. `choose(score [N, K] >= 0, step
    from 1)` is the mask to keep at a step; it must reach the target pattern by the last.
    """
    norm = hessian.diagonal().sqrt()
    target = weight * norm
    hessian.div_(norm).div_(norm[:, None])
    hessian.diagonal().add_(settings.damping)
    inverse, damping = _shifted_inverse(hessian, settings.penalty)
    pull = target @ hessian

    solution, dual = target, torch.zeros_like(target)
    mask = torch.ones_like(target, dtype=torch.bool)
    for step in range(1, settings.iterations + 1):
        proposal = solution + dual
        mask = choose(proposal.abs(), step)
        sparse = proposal * mask
        dual = proposal - sparse
        solution = sparse.sub_(dual).mul_(settings.penalty).add_(pull) @ inverse
    del inverse, pull, proposal, sparse, dual  # the rest holds as many matrices again
    solution.mul_(mask)
    residual = ((target - solution) @ hessian).mul_(mask)
    refined = conjugate_gradient(residual, hessian, mask, settings.refine).add_(solution)
    return refined.div_(norm).masked_fill_(~mask, 0.0), mask, settings.damping + damping


def _shifted_inverse(hessian: Tensor, penalty: float) -> tuple[Tensor, float]:
    """`(hessian + penalty I)^-1` `[K, K]`, and the damping that factoring it took; `hessian` is restored."""
    diagonal = hessian.diagonal().clone()
    hessian.diagonal().add_(penalty)
    factor, damping = damped_cholesky(hessian, 1e-6)
    hessian.diagonal().copy_(diagonal)
    return torch.cholesky_inverse(factor, out=factor), damping


def gradual_mask(score: Tensor, config: ADMMConfig, step: int) -> Tensor:
    """Mask `[N, K]` at `step` (from 1): the target pattern plus the best of the rest, down to it at `config.ramp`."""
    return tighten(score, pattern_mask(score, config), config, step)


def tighten(score: Tensor, pattern: Tensor, settings: ADMMSettings, step: int) -> Tensor:
    """`pattern` (bool, like `score`) plus as many of the best other scores as the schedule still allows at `step`."""
    if step >= settings.ramp:
        return pattern
    kept = 1 - (1 - settings.kept) * (1 - (1 - step / settings.ramp) ** 3)
    extra = round(kept * score.numel()) - int(pattern.sum())
    if extra <= 0:
        return pattern
    rest = score[~pattern]
    # What the pattern keeps is safe; the others compete across the whole layer.
    return pattern | (score >= rest.kthvalue(len(rest) - extra + 1).values)
