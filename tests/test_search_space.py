"""Searches without a model: points that keep the budget, and the strategies that propose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfweight.compress.search.config import Search
from halfweight.compress.search.space import project
from halfweight.compress.search.strategies import evolution, strategy
from recipe_cases import MLP
from searches import BLOCKS, METHODS, bits_unread, need, recipe, space

# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [{}, {"score": "l2", "channels": 0.9}, {"sparsity": 0.8, "score": "l1"}], ids=str)
def test_every_point_keeps_the_budget(selection: dict[str, Any]) -> None:
    where = space(recipe(**selection))
    assert [len(blocks) for blocks in where.groups].count(2) == 2 and len(where.groups) == 10
    assert sorted(block for blocks in where.groups for block in blocks) == list(range(12))
    start = bits_unread(where, {name: member.start for name, member in where.members.items()})
    generator = torch.Generator().manual_seed(0)
    corners = [[0.0] * where.size, [1.0] * where.size, *torch.rand(20, where.size, generator=generator).tolist()]
    corners += torch.rand(20, where.size, generator=generator).round().tolist()
    for point in corners:
        budgets = where.budgets(point, {})
        assert bits_unread(where, budgets) == pytest.approx(start, rel=1e-10)
        for name, member in where.members.items():
            assert member.low <= budgets[name].sparsity <= member.high and 0.5 <= budgets[name].channels <= 1
            split = member.split(budgets[name])  # what the budget pays for fills it to the last bit
            n, k = member.shape
            beside = 32 * (1 + k * (member.settings.score != "size")) + 16 * (n + k) * split.rank
            assert split.inputs * member.bits + beside == pytest.approx((1 - budgets[name].sparsity) * member.bits)
            assert split.rank <= where.largest_rank(member)
    middle = where.budgets([0.5] * where.size, {})
    assert middle == {name: member.start for name, member in where.members.items()}


def test_greedy_blocks_are_divided_by_their_curves_within_their_share() -> None:
    where = space(recipe(allocation="greedy", search={"groups": 12}))
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    tails = {name: name.rpartition(".")[2] for name in where.members}
    curves = {
        block: {name: {level: level**2 * (9 if tails[name] in MLP else 1) for level in levels} for name in names}
        for block, names in enumerate(BLOCKS)
    }
    generator = torch.Generator().manual_seed(0)
    for point in ([0.5] * 12, torch.rand(12, generator=generator).tolist()):
        plain, divided = where.budgets(point, {}), where.budgets(point, curves)
        for names in BLOCKS:
            shares = [
                sum(where.members[name].bits * found[name].sparsity for name in names) for found in (plain, divided)
            ]
            assert shares[0] == pytest.approx(shares[1], rel=1e-10)
        q, up = (divided[f"model.layers.3.{name}"].sparsity for name in ("self_attn.q_proj", "mlp.up_proj"))
        assert q > up


def test_a_projection_is_the_nearest_point() -> None:
    wanted, weights = {"a": 0.9, "b": 0.2, "c": 0.4}, {"a": 1, "b": 2, "c": 3}
    got = project(wanted, {"a": (0.0, 0.95), "b": (0.0, 1.0), "c": (0.0, 1.0)}, weights, 3.6)
    assert sum(weights[name] * got[name] for name in got) == pytest.approx(3.6, abs=1e-12)
    assert got["a"] == 0.95 and got["b"] - 0.2 == pytest.approx(got["c"] - 0.4)
    assert project(wanted, dict.fromkeys(wanted, (0.0, 1.0)), weights, 2.5) == wanted


def test_channels_alone_vary_as_in_the_paper() -> None:
    where = space(recipe(channels=0.95, search={"vary": ["channels"]}))
    assert where.size == 10
    budgets = where.budgets([0.0, 1.0, *[0.5] * 8], {})
    assert {budget.sparsity for budget in budgets.values()} == {0.5}
    first, second = (budgets[f"model.layers.{block}.mlp.up_proj"].channels for block in (0, 1))
    assert (first, second) == (1.0, pytest.approx(0.5))


# --- strategies ----------------------------------------------------------------------------------------------------


def run(settings: Search, size: int, objective: Callable[[torch.Tensor], torch.Tensor]) -> list[list[float]]:
    steps = strategy(settings, size)
    points = [next(steps)]
    while len(points) < settings.trials:
        points.append(steps.send(float(objective(torch.tensor(points[-1])))))
    return points


def bowl(point: torch.Tensor) -> torch.Tensor:
    return (point - torch.linspace(0.2, 0.9, len(point))).square().sum()


@pytest.mark.parametrize("method", METHODS)
def test_a_strategy_starts_in_the_middle_and_repeats_itself(method: str) -> None:
    need(method)
    settings = Search.model_validate({"method": method, "trials": 30})
    points = run(settings, 6, bowl)
    assert points[0] == [0.5] * 6 and len({tuple(point) for point in points}) == 30
    assert all(0 <= x <= 1 for point in points for x in point)
    assert run(settings, 6, bowl) == points
    reseeded = run(settings.model_copy(update={"seed": 1}), 6, bowl)
    assert (reseeded == points) == (method == "descent")  # which draws nothing


@pytest.mark.parametrize("method", ["evolution", "descent", "tpe", "cma"])
def test_a_search_beats_the_start_and_the_control(method: str) -> None:
    need(method)

    def best(method: str, seed: int) -> float:
        settings = Search.model_validate({"method": method, "trials": 64, "seed": seed})
        return min(float(bowl(torch.tensor(point))) for point in run(settings, 10, bowl))

    found, control = (sum(best(name, seed) for seed in range(5)) / 5 for name in (method, "random"))
    assert found < 0.6 * float(bowl(torch.full((10,), 0.5))) and found < 0.9 * control


def test_parents_are_the_best_so_far() -> None:
    """Elitism: with mutations off, a child's coordinates are those of the best `population` trials."""
    settings = Search(population=3, trials=40)
    steps = evolution(settings, 40)
    points = [next(steps)]
    values = []
    for _ in range(39):
        values.append(float(bowl(torch.tensor(points[-1]))))
        points.append(steps.send(values[-1]))
        if len(points) > 4:
            elite = [points[i] for i in sorted(range(len(values)), key=values.__getitem__)[:3]]
            kept = sum(any(x == parent[i] for parent in elite) for i, x in enumerate(points[-1]))
            assert kept >= 15  # two in three on average
