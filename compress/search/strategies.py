"""Where to look next: each strategy is a generator that yields a point of the unit cube and is sent its objective.

The first point is always the middle, which stands for the recipe as it is. A strategy depends on its settings and on
the objectives it is sent alone, so that a search is resumed by sending it the objectives of the trials it made before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from importlib.util import find_spec
from typing import Any

import torch

from ...serving.errors import InputError
from .config import Search

Point = list[float]
Strategy = Generator[Point, float, None]

_SLOPE = 0.15  # edges of the cube between two points that a slope is measured by
_STEPS = (0.02, 0.3)  # smallest and largest mutation, in edges of the cube; each child draws its own in between


def require(settings: Search) -> None:
    """Raise InputError when a package that the method needs is not installed."""
    needed = {"tpe": ("optuna",), "cma": ("optuna", "cmaes")}.get(settings.method, ())
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"search method {settings.method} needs the package {missing[0]}: pip install 'halfweight[search]'; or"
            " choose evolution"
        )


def strategy(settings: Search, size: int) -> Strategy:
    """The strategy of `settings` in a cube of `size` dimensions."""
    require(settings)
    made: dict[str, Callable[[Search, int], Strategy]] = {"descent": descent, "evolution": evolution, "random": random}
    return made.get(settings.method, _sampler)(settings, size)


def evolution(settings: Search, size: int) -> Strategy:
    """Evolutionary search as R-Sparse's (Zhang et al. 2025, arXiv 2504.19449, section 3.5): population, crossover,
    mutation, elitist selection. The paper does not publish its operators; these are ours.

    The best `population` trials so far are the parents, so that a child replaces the worst of them as soon as it is
    better: with tens of trials there are too few for whole generations. Parents win a tournament of two; each
    coordinate comes from either of them; one in three, and at least one, moves by a normal step whose size is drawn
    anew for every child. The first children are mutants of the start in all coordinates.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    done: list[tuple[float, torch.Tensor]] = []
    point = torch.full((size,), 0.5, dtype=torch.float64)
    while True:
        done.append(((yield point.tolist()), point))
        if len(done) < settings.population:
            point, moved = done[0][1], torch.ones(size, dtype=torch.bool)
        else:
            elite = sorted(done, key=lambda pair: pair[0])[: settings.population]
            ranks = torch.randint(0, len(elite), (2, 2), generator=generator).min(dim=1).values.tolist()
            mother, father = (elite[rank][1] for rank in ranks)
            point = torch.where(torch.rand(size, generator=generator) < 0.5, mother, father)
            moved = torch.rand(size, generator=generator) < 1 / 3
            moved[int(torch.randint(0, size, (1,), generator=generator))] = True
        low, high = _STEPS
        step = low * (high / low) ** float(torch.rand(1, generator=generator))
        noise = torch.randn(size, dtype=torch.float64, generator=generator)
        point = (point + step * noise * moved).clamp(0, 1)


def descent(settings: Search, size: int) -> Strategy:
    """Descent along measured slopes (forward differences, one trial per coordinate, then a line search).

    Steps along all slopes at once double in length while they help; the next slopes are measured where they end, over
    half the distance if no step helped. Draws nothing: the seed does not matter.
    """
    point = torch.full((size,), 0.5, dtype=torch.float64)
    value = yield point.tolist()
    step = _SLOPE
    while True:
        slopes = torch.zeros_like(point)
        for i in range(size):
            there = point.clone()
            there[i] += step if point[i] <= 0.5 else -step
            slopes[i] = ((yield there.tolist()) - value) / (there[i] - point[i])
        begin, direction, length = point, -slopes / slopes.abs().max().clamp_min(1e-30), step
        while True:
            there = (begin + length * direction).clamp(0, 1)
            found = yield there.tolist()
            if not found < value:
                break
            point, value, length = there, found, 2 * length
        if point is begin:
            step = step / 2


def random(settings: Search, size: int) -> Strategy:
    """The control: points spread evenly over the cube, whatever their objectives."""
    generator = torch.Generator().manual_seed(settings.seed)
    yield [0.5] * size
    while True:
        yield torch.rand(size, dtype=torch.float64, generator=generator).tolist()


def _sampler(settings: Search, size: int) -> Strategy:
    """A sampler of the package optuna: tree-structured Parzen estimators (Bergstra et al. 2011) over all coordinates
    together, or CMA-ES (Hansen 2016, arXiv 1604.00772), which begins in the middle by itself."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = {f"{i:04d}": 0.5 for i in range(size)}
    sampler: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if settings.method == "tpe":
            sampler = optuna.samplers.TPESampler(seed=settings.seed, multivariate=True)
        else:
            sampler = optuna.samplers.CmaEsSampler(seed=settings.seed)
        study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(start)
    while True:
        trial = study.ask()
        point = [trial.suggest_float(name, 0, 1) for name in start]
        study.tell(trial, (yield point))
