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
from contextlib import ExitStack
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from ..eval.selection import dense_tokens_of
from ..serving.errors import RunError
from ..serving.scheme import fused_groups
from .allocation import divide, selection_of_stage, weight_bits, without_branch
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
from .tuning.teacher import chunks

TOKENS = 8192  # of the calibration, at most
LEVELS = tuple(number / 10 for number in range(1, 10))
REFITS = 4  # steps of conjugate gradients that refit what is kept of a pruned weight
_LOGITS = 2**22  # that exist at once, fp32

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
    few = first_windows(windows, TOKENS)
    curves: Curves = {name: {} for name in stages}
    inputs: list[list[Tensor]] = []  # of every block, on the host
    stream = walker.embed(few)
    for index in range(walker.n_blocks):
        say(f"forward through {walker.block_prefix(index)}")
        inputs.append([x.cpu() for x in stream])
        with walker.block(index) as block:
            stream = [walker.run(index, block, x) for x in stream]
    say("labels")
    gradients = _label_gradients(walker, stream, few, seed)
    del stream
    for index in reversed(range(walker.n_blocks)):
        say(f"backward through {walker.block_prefix(index)}")
        with walker.block(index) as block:
            linears = {name: linear for name, linear in walker.block_linears(index).items() if name in stages}
            run = partial(walker.call, index, block, weights={})
            held: dict[str, list[tuple[Tensor, Tensor]]] = {}

            def see(name: str, x: Tensor, gradient: Tensor) -> None:
                if stages[name].selection is None:
                    held.setdefault(name, []).append((x, gradient))  # noqa: B023  # all of it in this turn
                else:
                    _add_losses(curves[name], name, linears[name].weight, stages[name], x, gradient)  # noqa: B023

            for number, x in enumerate(inputs.pop()):
                gradients[number] = _through(run, x.to(walker.device), gradients[number], linears, see)
            for name, parts in held.items():
                x, gradient = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                _require_finite(name, gradient)
                curves[name] = pruning_losses(linears[name].weight, stages[name], x, gradient)
    return curves


def _label_gradients(
    walker: BlockWalker, outputs: Sequence[Tensor], windows: Sequence[Tensor], seed: int
) -> list[Tensor]:
    """The gradient of the summed cross entropy of drawn labels at the last block's `outputs` `[B, T, D]`, likewise."""
    generator = torch.Generator(walker.device).manual_seed(seed)
    rows = [row[None].detach().requires_grad_() for x in outputs for row in x]
    with walker.vocabulary(), torch.enable_grad():
        for row, window in zip(rows, windows, strict=True):
            for keep in chunks(walker, len(window), _LOGITS):
                logits = walker.logits(walker.decoded(row, window), window, keep)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    found = torch.cat([row.grad for row in rows if row.grad is not None])
    return list(found.split([len(x) for x in outputs]))


def _through(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    gradient: Tensor,
    linears: Mapping[str, nn.Linear],
    see: Callable[[str, Tensor, Tensor], None],
) -> Tensor:
    """The gradient at a block's input `x` from the `gradient` at its output `run(x)`. `see(name, x, gradient)` gets, of
    each of the block's `linears`, the inputs `[tokens, K]` that count and the gradients `[tokens, N]` at its output."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def backward(gradient: Tensor) -> None:
                first = dense_tokens_of(args[0].shape[1]) if args[0].ndim == 3 else 0
                seen = (part.detach()[..., first:, :].reshape(-1, part.shape[-1]) for part in (args[0], gradient))
                with torch.no_grad():
                    see(name, *seen)

            output.register_hook(backward)

        return forward

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(watch(name)).remove)
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(run(start), start, gradient)
    return found


def _add_losses(
    curve: dict[float, float], name: str, weight: Tensor, stage: StageConfig, x: Tensor, gradient: Tensor
) -> None:
    """Add to the `curve` of a linear with `weight` `[N, K]` what the predictions lose for its inputs `x` `[tokens, K]`,
    of which more and more are not read, with the `gradient` `[tokens, N]` at its output."""
    worth = (gradient @ weight).float() * x.float()  # of x_j: its part of g . y
    _require_finite(name, worth)
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


def _require_finite(name: str, gradients: Tensor) -> None:
    if not bool(torch.isfinite(gradients).all()):
        raise RunError(f"{name}: the gradients through it are not finite; try --dtype float32, or another `allocation`")
