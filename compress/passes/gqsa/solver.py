"""GQSA's one-shot stage (Zeng et al. 2024, arXiv 2412.17560): groups are pruned and what stays is quantized, in one
sweep that feeds both errors forward; then coordinate descent.

The mask comes with the sweep from optimal brain surgeon over whole groups (Hassibi et al. 1993; for groups: Kurtic et
al. 2022, arXiv 2203.07259), or before it from ADMM, which also moves the weights to where the mask wants them.
"""

from __future__ import annotations

from torch import Tensor

from ...statistics import InputStatistics
from ..admm.solver import least_squares, tighten
from ..base import PruneResult
from ..hessian import revive_dead_inputs
from ..joint import MakeChoose, sweep_and_descend
from ..masks import nm_mask, top_mask
from ..sweep import Choose, Span
from .config import GQSAConfig
from .masks import (
    GroupChoice,
    GroupSurgeon,
    additive_scores,
    budget,
    by_pattern,
    fixed,
    group_mask,
    group_sums,
    of_outputs,
    spread_groups,
)


def solve(weight: Tensor, statistics: InputStatistics, config: GQSAConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 and the input Hessian `[K, K]` -> codes under the chosen mask, and what they stand for.

    Raises HessianError when no damping makes the Hessian positive definite.
    """
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    if config.mask != "admm":
        choice = _choice(config, (weight.shape[0], weight.shape[1]), hessian.diagonal())
        return sweep_and_descend(weight, weight, hessian, config, inside_order=config.nm is None, choose=choice)
    start, mask, _ = least_squares(weight, hessian, config, lambda score, step: _gradual_mask(score, config, step))
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    return sweep_and_descend(weight, start, hessian, config, choose=lambda upper, order, spans: fixed(mask, order))


def _gradual_mask(score: Tensor, config: GQSAConfig, step: int) -> Tensor:
    """Mask `[N, K]` for ADMM's `step`, from |weights| `[N, K]` on the normalised Hessian."""
    if config.nm is not None:
        return tighten(score, nm_mask(score, *config.nm), config, step)
    if config.by_outputs:
        sums = group_sums(score.T.square(), config.group_size)
        mask = tighten(sums, top_mask(sums, config.kept_groups((score.shape[0], score.shape[1]))), config, step)
        return spread_groups(mask, config.group_size, score.shape[0]).T
    sums = group_sums(score.square(), config.group_size)
    pattern = group_mask(sums, *budget(config, (score.shape[0], score.shape[1]), score.device))
    return spread_groups(tighten(sums, pattern, config, step), config.group_size, score.shape[1])


def _choice(config: GQSAConfig, shape: tuple[int, int], power: Tensor) -> MakeChoose:
    """How the sweep of a linear of `shape` `(N, K)` whose inputs have mean squares `power` `[K]` chooses its masks."""

    def make(upper: Tensor, order: Tensor, spans: list[Span]) -> Choose:
        weights = power[order] if config.mask == "wanda" else upper.diagonal().reciprocal().square()
        if config.nm is not None:
            return by_pattern(lambda free, start: free.square() * weights[start : start + len(free), None], config.nm)
        if config.by_outputs:
            return of_outputs(config.kept_groups(shape), config.group_size)
        kept, segment = budget(config, shape, power.device)
        score = GroupSurgeon(upper, spans) if config.mask == "obs" else additive_scores(weights, spans)
        return GroupChoice(score, spans, kept, segment)

    return make
