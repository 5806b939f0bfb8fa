"""What a model's predictions lose when one of its linears is sparser: error curves that compare linears of all blocks.

Let a linear's output for token t move by e_t. To second order the predictions then diverge (KL) from what they were by
half of the mean of `(sum_t g_t . e_t)^2` over labels drawn from them, with g_t the gradient of the labels' summed cross
entropy at that output: the Fisher information, as a measure of what may be removed (Theis et al. 2018, arXiv
1801.05787). Terms of different tokens are taken as independent here, `sum_t (g_t . e_t)^2`, and so are linears, whose
losses add up.

With `e_t = -W (x_t - select(x_t))`, or `e_t = (W' - W) x_t` for a pruned W', one backward pass prices every sparsity of
every linear. It is taken at the dense model, whose predictions have no slope in KL; where much is left out already they
have one, which this leaves out. The second order grows without bound, and a few tokens would decide alone. So the first
of a window are left out, which read everything when models are scored, and terms count as `log(1 + term)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..serving.scheme import fused_groups
from .allocation import divide, selection_of_stage, weight_bits, without_branch
from .backward import TOKENS, backward, require_finite
from .blocks import BlockWalker
from .calibration import first_windows
from .passes import StageConfig
from .passes.gqsa.config import GQSAConfig
from .passes.gqsa.masks import group_sums, spread_groups
from .passes.hessian import revive_dead_inputs
from .passes.least_squares import refit
from .passes.masks import top_mask
from .passes.selection import column_norms, scores
from .quantiles import QuantileSketch
from .statistics import InputStatistics

LEVELS = tuple(number / 10 for number in range(1, 10))
REFITS = 4  # steps of conjugate gradients that refit what is kept of a pruned weight

Curves = dict[str, dict[float, float]]


def allocate_by_fisher(
    walker: BlockWalker,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """A sparsity for each linear whose stage (by name) says `allocation: fisher`, such that together they leave as many
    of their weights' bytes unread, or of their weights out, as with the sparsities of their stages, and the predictions
    lose least. Pruned linears that servers fuse get the same.

    `windows` `[T]` are the calibration's, of which the first are used, and labels are drawn by `seed`. One block's
    weights are held at a time, besides the inputs of all blocks, and for a block that is pruned the inputs of its
    linears and the gradients at their outputs; `say` is told which block it is. Raises RunError where gradients are not
    finite.
    """
    sharing, shapes = {name: stage for name, stage in stages.items() if stage.shares_by_fisher}, walker.linear_shapes()
    found: dict[str, float] = {}
    curves = prediction_curves(walker, sharing, windows, seed, say)
    for selecting in (True, False):
        chosen = {name: stage for name, stage in sharing.items() if (stage.selection is not None) == selecting}
        units = [[name] for name in chosen] if selecting else fused_groups(chosen)
        members = {unit[0]: unit for unit in units}
        weights = {
            first: sum(weight_bits(chosen[name], shapes[name]) if selecting else prod(shapes[name]) for name in unit)
            for first, unit in members.items()
        }
        shared = divide(
            {first: _summed([curves[name] for name in unit]) for first, unit in members.items()},
            weights,
            {first: chosen[first].sparsity for first in members},
        )
        for first, unit in members.items():
            found |= {name: chosen[name].nearest_sparsity(shared[first], shapes[name]) for name in unit}
    return found


def _summed(curves: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """What linears lose together that all get one sparsity."""
    return {level: sum(curve[level] for curve in curves) for level in set.intersection(*map(set, curves))}


def prediction_curves(
    walker: BlockWalker,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    seed: int,
    say: Callable[[str], None],
) -> Curves:
    """For each linear of `stages`: sparsity -> `sum_t log(1 + (g_t . e_t)^2)`, at tenths and at the stage's own.

    Arguments as for `allocate_by_fisher`.
    """
    curves: Curves = {name: {} for name in stages}
    for turn in backward(walker, first_windows(windows, TOKENS), seed, say):
        linears = {name: linear for name, linear in walker.block_linears(turn.index).items() if name in stages}
        held: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def see(name: str, x: Tensor, gradient: Tensor) -> None:
            if stages[name].selection is None:
                held.setdefault(name, []).append((x, gradient))  # noqa: B023  # all of it in this turn
            else:
                _add_losses(curves[name], name, linears[name].weight, stages[name], x, gradient)  # noqa: B023

        turn.back(linears, see)
        for name, parts in held.items():
            x, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            require_finite(name, gradient)
            curves[name] = pruning_losses(linears[name].weight, stages[name], x, gradient)
    return curves


def _add_losses(
    curve: dict[float, float], name: str, weight: Tensor, stage: StageConfig, x: Tensor, gradient: Tensor
) -> None:
    """Add to the `curve` of a linear with `weight` `[N, K]` what the predictions lose for its inputs `x` `[tokens, K]`,
    of which more and more are not read, with the `gradient` `[tokens, N]` at its output."""
    worth = (gradient @ weight).float() * x.float()  # of x_j: its part of g . y
    require_finite(name, worth)
    score = scores(x, column_norms(weight, selection_of_stage(stage).score))
    sketch = QuantileSketch()
    sketch.add(score)
    shape = (weight.shape[0], weight.shape[1])
    for level, trial, scheme in without_branch(stage, shape, LEVELS):
        unread = score <= sketch.quantile(1 - trial.split(shape, scheme).inputs)
        curve[level] = curve.get(level, 0.0) + _lost(torch.where(unread, worth, 0.0).sum(-1))


def pruning_losses(weight: Tensor, stage: StageConfig, x: Tensor, gradient: Tensor) -> dict[float, float]:
    """What the predictions lose as more and more groups of each row of `weight` `[N, K]` are pruned: those with the
    smallest sums of squared weights times input norms, and what is kept is fitted again.

    `x` `[tokens, K]` are the linear's inputs, and `gradient` `[tokens, N]` those at its output.
    """
    assert isinstance(stage, GQSAConfig) and stage.group is not None  # only such stages share their weights
    statistics = InputStatistics(weight.shape[1], True, weight.device)
    statistics.add(x)
    dense, hessian, _ = revive_dead_inputs(weight.float(), statistics.hessian)
    score = group_sums(dense.square() * hessian.diagonal(), stage.group)
    curve = {0.0: 0.0}
    for level in sorted({*LEVELS, stage.sparsity}):
        groups = top_mask(score, round((1 - level) * score.shape[1]))
        mask = spread_groups(groups, stage.group, weight.shape[1])
        pruned = refit(dense * mask, dense, hessian.clone(), mask, stage.damping, REFITS)
        lost = x @ (pruned - dense).T.to(x.dtype)  # 16 bits are enough for a difference
        curve[level] = _lost((lost * gradient).sum(-1, dtype=torch.float32))
    return curve


def _lost(slopes: Tensor) -> float:
    """The loss by all tokens, of which each moves the log likelihood by its one of the `slopes` `[tokens]`."""
    return float(slopes.square().log1p().sum())
