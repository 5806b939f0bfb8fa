"""A search from its first trial to a recipe whose profile is the best of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...serving.errors import RunError
from ..blocks import BlockWalker
from ..calibration import Windows
from ..journal import Journal
from ..passes import StageConfig
from ..recipe import Recipe
from ..report import OnProgress, Progress, SearchReport, SearchTrial
from .config import Search
from .fitness import Fitness, open_fitness
from .space import Budget, Space, profile_of
from .strategies import Point, require, strategy

_TRIAL, _RESULT = "trial", "search"


@dataclass(frozen=True)
class Searched:
    """The `recipe` without its search and with what that found, and what there is to report."""

    recipe: Recipe
    report: SearchReport
    trials: list[SearchTrial]


def space_of(walker: BlockWalker, settings: Search, stages: Mapping[str, StageConfig]) -> Space:
    """What a search chooses from; InputError when nothing varies, or a package that the method needs is missing."""
    require(settings)
    shapes = walker.linear_shapes()
    blocks = [{name: shapes[name] for name in walker.block_linears(index)} for index in range(walker.n_blocks)]
    return Space(settings, stages, blocks)


def search(
    walker: BlockWalker,
    recipe: Recipe,
    space: Space,
    stages: Mapping[str, StageConfig],
    windows: Windows,
    journal: Journal,
    progress: OnProgress,
) -> Searched:
    """Try what the `recipe` asks for in its `space`; every trial is durable in the `journal` before the next begins.

    Trials found there are not made again: the strategy is told their objectives and proposes the same points, as it
    depends on nothing else. Raises RunError when the journal holds other points than the strategy proposes.
    """
    settings = space.settings
    with ExitStack() as opened:

        @cache
        def fitness() -> Fitness:
            """The model, loaded when there is something to try."""

            def say(detail: str) -> None:
                progress(Progress("search", len(journal.notes(_TRIAL)), settings.trials, detail))

            model = open_fitness(walker, space, stages, windows.calibration, windows.search, say)
            return opened.enter_context(model)

        trials = _try_all(space, journal, fitness, progress)
        objectives = [trial.objective for trial in trials]
        chosen = objectives.index(min(objectives))
        if not journal.notes(_RESULT):
            found = _with_profiles(recipe, walker, space.budgets(trials[chosen].point, fitness().curves))
            journal.note(_RESULT, {"stages": [stage.model_dump(mode="json", by_alias=True) for stage in found.stages]})
    data: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    result = Recipe.parse({**data, "search": None, "stages": journal.notes(_RESULT)[0]["stages"]})
    return Searched(result, SearchReport(settings=settings, groups=space.groups, chosen=chosen), trials)


def _try_all(space: Space, journal: Journal, fitness: Callable[[], Fitness], progress: OnProgress) -> list[SearchTrial]:
    """Every trial, in order: from the journal those it holds, the others made and noted there."""
    settings, held = space.settings, journal.notes(_TRIAL)
    steps = strategy(settings, space.size)
    point = next(steps)
    trials: list[SearchTrial] = []
    while True:
        number = len(trials)
        if number < len(held):
            trial = SearchTrial.model_validate(held[number])
            if trial.point != point:
                raise RunError(
                    f"{journal.folder}: another version of the search made trial {number}; pass --fresh to begin again"
                )
        else:
            trial = _try(space, point, fitness(), trials[0].objective if trials else None)
            journal.note(_TRIAL, trial.model_dump())
        trials.append(trial)
        best = min(trial.objective for trial in trials)
        detail = f"{settings.objective} {trials[0].objective:.4f} -> {best:.4f}"
        progress(Progress("search", len(trials), settings.trials, detail))
        if len(trials) == settings.trials:
            return trials
        point = steps.send(trial.objective)


def _with_profiles(recipe: Recipe, walker: BlockWalker, budgets: Mapping[str, Budget]) -> Recipe:
    """`recipe` whose stages that select have the `budgets` as profiles."""
    owners = recipe.owners(walker.linear_shapes())
    prefixes = [walker.block_prefix(index) for index in range(walker.n_blocks)]
    stages = []
    for number, stage in enumerate(recipe.stages):
        own = [name for name in budgets if owners[name] == number]
        stages.append(profile_of(stage, own, budgets, prefixes) if own else stage)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _try(space: Space, point: Point, fitness: Fitness, start: float | None) -> SearchTrial:
    """One trial; `start` is the first one's objective, if this is not it."""
    begin = time.monotonic()
    budgets = space.budgets(point, fitness.curves)
    objective = fitness(budgets)
    means = [_mean(space, budgets, blocks) for blocks in space.groups]
    sparsity, channels = [mean.sparsity for mean in means], [mean.channels for mean in means]
    words = f"{objective / start - 1:+.1%} of the start; " if start else ""
    words += f"sparsity {_range(sparsity)}" + (f", channels {_range(channels)}" if min(channels) < 1 else "")
    return SearchTrial(
        objective=objective,
        detail=words,
        point=point,
        sparsity=sparsity,
        channels=channels,
        seconds=time.monotonic() - begin,
    )


def _mean(space: Space, budgets: Mapping[str, Budget], blocks: Sequence[int]) -> Budget:
    """The mean budget of the linears in `blocks`, weighed by their bits."""
    bits = {name: member.bits for name, member in space.members.items() if member.block in blocks}
    total = sum(bits.values())
    sparsity, channels = (sum(bits[name] * budgets[name][i] for name in bits) / total for i in range(2))
    return Budget(sparsity, channels)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
