"""How much each linear of a block reads, when together they may read a fixed share of the block's bytes.

As in TEAL's greedy search (Liu et al. 2024, arXiv 2408.14690, algorithm 1), the next bytes are given up where the
block's output suffers least. Errors are measured with one linear selecting at a time and added up, which takes a few
forward passes per linear instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..serving.linear import SelectingLinear
from ..serving.scheme import LinearScheme
from ..serving.storage import pack_selection, selection_of
from .blocks import BlockWalker
from .passes.base import SelectionSettings, StageConfig
from .passes.selection import column_norms, scores, threshold_of
from .quantiles import QuantileSketch

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Step(NamedTuple):
    """Linear `name` may go from `start` to `sparsity`, which costs `slope` per byte; `weight` is its bytes."""

    slope: float
    name: str
    start: float
    sparsity: float
    weight: int


def selecting_linears(
    walker: BlockWalker, index: int, stages: Mapping[str, StageConfig], dense_tokens: int
) -> dict[str, nn.Linear]:
    """The linears of block `index`, held by the `walker`, that `stages` work on; those that will select their inputs
    are replaced by ones that can.

    As where models are scored, the first `dense_tokens` of a window read all inputs, for all others attend to them.
    Where a prompt chooses the inputs, they select like the others.
    """
    linears = {name: linear for name, linear in walker.block_linears(index).items() if name in stages}
    for name, linear in linears.items():
        if stages[name].selection is not None:
            linears[name] = selecting = SelectingLinear.like(linear)
            by_prompt = selection_of_stage(stages[name]).threshold == "prompt"
            selecting.dense_tokens = 0 if by_prompt else dense_tokens
            walker.model.set_submodule(name, linears[name])
    return linears


@torch.no_grad()
def allocate(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Linear],
    stages: Mapping[str, StageConfig],
    inputs: Sequence[Tensor],
) -> dict[str, float]:
    """A sparsity for each of a block's `linears` whose stage (by name) allocates greedily; none has a selection yet.

    `run` is the block's forward pass, for its `inputs`. Together these linears leave as many of their weights' bytes
    unread as with the sparsities of their stages.
    """
    sharing = {
        name: linear
        for name, linear in linears.items()
        if isinstance(linear, SelectingLinear) and selection_of_stage(stages[name]).allocation == "greedy"
    }
    curves = error_curves(run, sharing, stages, inputs) if sharing else {}
    weights = {name: weight_bits(stages[name], (n.out_features, n.in_features)) for name, n in sharing.items()}
    return divide(curves, weights, {name: selection_of_stage(stages[name]).sparsity for name in sharing})


def with_sparsities(stages: Mapping[str, StageConfig], sparsities: Mapping[str, float]) -> dict[str, StageConfig]:
    """The stages (by linear) named in `sparsities`, with these."""
    return {name: stages[name].with_sparsity(sparsity) for name, sparsity in sparsities.items()}


def weight_bits(stage: StageConfig, shape: tuple[int, int]) -> int:
    """Bits of the weight of a linear of `shape` `(N, K)` as its `stage` stores it, a part of which is read."""
    return selection_of_stage(stage).bits(shape, stage.weight_scheme(shape))[0]


def without_branch(
    stage: StageConfig, shape: tuple[int, int], levels: Sequence[float]
) -> Iterator[tuple[float, SelectionSettings, LinearScheme]]:
    """Each of the `levels` and the `stage`'s own sparsity, rising, with the settings and the scheme of a linear of
    `shape` `(N, K)` that does not read so much and has no branch; up to where norms alone are more than may be read."""
    settings, weight = selection_of_stage(stage), stage.weight_scheme(shape)
    for level in sorted({*levels, settings.sparsity}):
        trial = settings.model_copy(update={"sparsity": level, "channels": 1.0})
        try:
            scheme = trial.scheme(weight, shape)
        except ValueError:
            return
        yield level, trial, scheme


@torch.no_grad()
def error_curves(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, SelectingLinear],
    stages: Mapping[str, StageConfig],
    inputs: Sequence[Tensor],
) -> dict[str, dict[float, float]]:
    """What a block's outputs lose (`token_errors`) by each of its `linears` alone at some sparsities, that of its stage
    among them: name -> sparsity -> error. Arguments as for `allocate`."""
    sketches = {name: QuantileSketch() for name in linears}
    norms = {
        name: column_norms(linear.weight.float(), selection_of_stage(stages[name]).score)
        for name, linear in linears.items()
    }

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: sketches[name].add(scores(args[0], norms[name]))

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    wanted = [run(x) for x in inputs]
    for handle in handles:
        handle.remove()
    curves: dict[str, dict[float, float]] = {name: {} for name in linears}
    for name, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        for level, trial, scheme in without_branch(stages[name], shape, LEVELS):
            chosen = threshold_of(sketches[name], norms[name], trial, scheme, shape)
            linear.selection = selection_of(scheme, pack_selection(scheme, chosen))
            curves[name][level] = sum(token_errors(run(x), y) for x, y in zip(inputs, wanted, strict=True))
        linear.selection = None
    return curves


def token_errors(got: Tensor, wanted: Tensor) -> float:
    """The sum of each token's `||y' - y||^2 / ||y||^2`: a few tokens have outputs a thousand times larger than the
    others', and would decide alone."""
    size = wanted.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((got - wanted).float().square().sum(-1) / size).sum())


def divide(
    curves: Mapping[str, Mapping[float, float]], weights: Mapping[str, int], sparsities: Mapping[str, float]
) -> dict[str, float]:
    """Sparsities that lose least by `curves` (name -> sparsity -> error, taken as convex between these sparsities).

    They leave the same number of the `weights` (bytes, or anything proportional) unread as `sparsities` do.
    """
    steps: list[Step] = []
    chosen = {}
    for name, curve in curves.items():
        points = _lower_hull(sorted(curve.items()))
        chosen[name] = points[0][0]
        for (start, before), (stop, after) in pairwise(points):
            slope = (after - before) / ((stop - start) * weights[name])
            steps.append(Step(slope, name, start, stop, weights[name]))
    left = sum(weights[name] * (sparsities[name] - chosen[name]) for name in chosen)
    for step in sorted(steps):
        taken = min(left, (step.sparsity - step.start) * step.weight)
        if taken <= 0:
            break
        chosen[step.name] = step.start + taken / step.weight
        left -= taken
    return chosen


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, in order of x, that the lower convex hull passes through."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def selection_of_stage(stage: StageConfig) -> SelectionSettings:
    """The selection of a stage that has one."""
    assert stage.selection is not None  # only such stages allocate
    return stage.selection
