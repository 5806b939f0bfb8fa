"""A search from its first trial to a recipe whose profile is the best of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...serving.errors import RunError
from ..blocks import BlockWalker
from ..calibration import Windows
from ..journal import Journal
from ..passes import StageConfig
from ..recipe import Recipe
from ..report import OnProgress, Progress, SearchReport, SearchTrial
from .fitness import Curves, Fitness, open_fitness
from .space import Budget, Space, profile_of
from .strategies import strategy

_TRIAL, _RESULT = "trial", "search"


@dataclass(frozen=True)
class Searched:
    """The `recipe` without its search and with what that found, and what there is to report."""

    recipe: Recipe
    report: SearchReport
    trials: list[SearchTrial]


def search(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    windows: Windows,
    journal: Journal,
    progress: OnProgress,
) -> Searched:
    """Try what `recipe.search` asks for; every trial is durable in the `journal` before the next begins.

    Trials found there are not made again: the strategy is told their objectives and proposes the same points, as it
    depends on nothing else. Raises InputError when there is nothing to vary, RunError when the journal holds other
    points than the strategy proposes.
    """
    settings = recipe.search
    assert settings is not None  # the caller has looked
    shapes = walker.linear_shapes()
    blocks = [{name: shapes[name] for name in walker.block_linears(index)} for index in range(walker.n_blocks)]
    space = Space(settings, stages, blocks)
    trials: list[SearchTrial] = []
    held = journal.notes(_TRIAL)
    finished = journal.notes(_RESULT)
    curves: Curves = {}

    def say(detail: str) -> None:
        progress(Progress("search", len(trials), settings.trials, detail))

    with ExitStack() as opened:
        fitness: Fitness | None = None
        steps = strategy(settings, space.size)
        point = next(steps)
        while True:
            number = len(trials)
            if number < len(held):
                trial = SearchTrial.model_validate(held[number])
                if trial.point != point:
                    raise RunError(
                        f"{journal.folder}: another version of the search made trial {number}; pass --fresh to start it"
                        " again"
                    )
            else:
                if fitness is None:
                    fitness = opened.enter_context(
                        open_fitness(walker, space, stages, windows.calibration, windows.search, say)
                    )
                    curves = fitness.curves
                begin = time.monotonic()
                budgets = space.budgets(point, curves)
                objective = fitness(budgets)
                seconds = time.monotonic() - begin
                start = trials[0].objective if trials else objective
                trial = _trial(space, point, budgets, objective, start, seconds)
                journal.note(_TRIAL, trial.model_dump())
            trials.append(trial)
            best = min(trials, key=lambda trial: trial.objective)
            say(f"{settings.objective} {trials[0].objective:.4f} -> {best.objective:.4f}")
            if len(trials) == settings.trials:
                break
            point = steps.send(trial.objective)
        chosen = trials.index(best)
        if not finished:
            if fitness is None:  # interrupted after the last trial: the curves are all that is missing
                fitness = opened.enter_context(
                    open_fitness(walker, space, stages, windows.calibration, windows.search, say)
                )
            found = _with_profiles(recipe, walker, space.budgets(best.point, fitness.curves))
            journal.note(_RESULT, {"stages": [stage.model_dump(mode="json", by_alias=True) for stage in found.stages]})
            finished = journal.notes(_RESULT)
    data: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    result = Recipe.parse({**data, "search": None, "stages": finished[0]["stages"]})
    return Searched(result, SearchReport(settings=settings, groups=space.groups, chosen=chosen), trials)


def _with_profiles(recipe: Recipe, walker: BlockWalker, budgets: Mapping[str, Budget]) -> Recipe:
    """`recipe` whose stages that select have the `budgets` as profiles."""
    owners = recipe.owners(walker.linear_shapes())
    prefixes = [walker.block_prefix(index) for index in range(walker.n_blocks)]
    stages = []
    for number, stage in enumerate(recipe.stages):
        own = [name for name in budgets if owners[name] == number]
        stages.append(profile_of(stage, own, budgets, prefixes) if own else stage)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _trial(
    space: Space, point: list[float], budgets: Mapping[str, Budget], objective: float, start: float, seconds: float
) -> SearchTrial:
    sparsity, channels = [], []
    for blocks in space.groups:
        members = {name: member for name, member in space.members.items() if member.block in blocks}
        bits = sum(member.bits for member in members.values())
        means = (
            sum(member.bits * share for member, share in zip(members.values(), shares, strict=True)) / bits
            for shares in zip(*(budgets[name] for name in members), strict=True)
        )
        for column, mean in zip((sparsity, channels), means, strict=True):
            column.append(mean)
    change = objective / start - 1 if start else 0.0
    words = f"{change:+.1%} of the start; sparsity {_range(sparsity)}"
    words += f", channels {_range(channels)}" if min(channels) < 1 else ""
    return SearchTrial(
        objective=objective, detail=words, point=point, sparsity=sparsity, channels=channels, seconds=seconds
    )


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
