"""Every solver against a slow, independent reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halfweight.compress.passes import PASSES, PruningConfig, SparseGPTConfig
from halfweight.compress.passes.hessian import HessianError
from halfweight.compress.passes.masks import nm_mask, pattern_mask, top_mask
from halfweight.compress.statistics import InputStatistics
from problems import (
    CPU,
    PATTERNS,
    PRUNERS,
    ROWS,
    SIZE,
    configure,
    least_squares,
    output_error,
    problem,
    solve,
    statistics_of,
)

# --- references ------------------------------------------------------------------------------------------------


def naive_keep(score: list[list[float]], config: PruningConfig) -> list[list[bool]]:
    """The pattern's mask by sorting Python lists: highest score first, then lowest index."""
    rows, size = len(score), len(score[0])
    mask = [[False] * size for _ in range(rows)]

    def keep(places: list[tuple[int, int]], count: int) -> None:
        for i, j in sorted(places, key=lambda place: (-score[place[0]][place[1]], place))[:count]:
            mask[i][j] = True

    if config.nm is not None:
        n, m = config.nm
        for i in range(rows):
            for start in range(0, size, m):
                keep([(i, j) for j in range(start, start + m)], n)
    elif config.scope == "row":
        for i in range(rows):
            keep([(i, j) for j in range(size)], round(config.kept * size))
    else:
        keep([(i, j) for i in range(rows) for j in range(size)], round(config.kept * rows * size))
    return mask


def naive_obs(weight: Tensor, hessian: Tensor, config: SparseGPTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgeon in float64, one column at a time, inverting the Hessian of the columns left each time.

    N:M groups go by falling mean of their inputs' squares.
    """
    rows, size = weight.shape
    m = config.nm[1] if config.nm is not None else size
    diagonal = hessian.diagonal().tolist()
    groups = sorted(
        (list(range(i, i + m)) for i in range(0, size, m)), key=lambda group: -sum(diagonal[j] for j in group)
    )
    order = [j for group in groups for j in group]
    back = np.argsort(order)
    w, h = weight.double().numpy()[:, order], hessian.double().numpy()[np.ix_(order, order)]
    h += config.damping * np.trace(h) / size * np.eye(size)
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(size)]
    keep = np.ones_like(w, dtype=bool)
    for i in range(size):
        if config.nm is not None and i % m == 0:
            for row in range(rows):
                cost = [w[row, j] ** 2 / inverses[j][0, 0] for j in range(i, i + m)]
                keep[row, i : i + m] = naive_keep([cost], config)[0]
        elif config.nm is None and i % config.block_size == 0:
            stop = min(i + config.block_size, size)
            cost = w[:, i:stop] ** 2 / np.array([inverses[j][0, 0] for j in range(i, stop)])
            share = 1 if config.scope == "row" else rows
            count = round(config.kept * stop * share) - round(config.kept * i * share)
            for part in [[row] for row in range(rows)] if config.scope == "row" else [range(rows)]:
                places = sorted((-cost[row, j], row, j) for row in part for j in range(stop - i))
                for _, row, j in places[count:]:
                    keep[row, i + j] = False
        for row in range(rows):
            if not keep[row, i]:
                w[row, i:] -= w[row, i] / inverses[i][0, 0] * inverses[i][0]
                w[row, i] = 0
    return w[:, back], keep[:, back]


# --- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 10_000])  # few levels: mostly ties
@pytest.mark.parametrize("nm", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (5, 24), (6, 8), (11, 12)])
def test_nm_masks_keep_the_highest_and_break_ties_to_the_left(nm: tuple[int, int], levels: int) -> None:
    score = torch.randint(levels, (5, 24), generator=torch.Generator().manual_seed(levels)).float()
    config = configure("magnitude", pattern=f"{nm[0]}:{nm[1]}")
    mask = nm_mask(score, *nm)
    assert mask.tolist() == naive_keep(score.tolist(), config)
    assert (mask.unflatten(-1, (-1, nm[1])).sum(-1) == nm[0]).all()


@pytest.mark.parametrize("nm", [(64, 128), (100, 129), (200, 256), (1, 512)])
def test_nm_masks_of_large_groups(nm: tuple[int, int]) -> None:
    score = torch.rand(2, 2 * nm[1], generator=torch.Generator().manual_seed(0))
    assert nm_mask(score, *nm).tolist() == naive_keep(
        score.tolist(), configure("magnitude", pattern=f"{nm[0]}:{nm[1]}")
    )


@pytest.mark.parametrize("levels", [1, 3, 10_000])
@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.77, 0.95])
def test_unstructured_masks_keep_the_highest_and_break_ties_to_the_left(
    density: float, scope: str, levels: int
) -> None:
    score = torch.randint(levels, (5, 21), generator=torch.Generator().manual_seed(levels)).float()
    config = configure("magnitude", pattern="unstructured", density=density, scope=scope)
    assert pattern_mask(score, config).tolist() == naive_keep(score.tolist(), config)


def test_top_mask_takes_nothing_and_everything() -> None:
    score = torch.rand(3, 7)
    assert not top_mask(score, 0).any()
    assert top_mask(score, 7).all()


# --- every pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", PRUNERS)
def test_results_have_the_exact_pattern_and_exact_zeros(name: str, pattern: str) -> None:
    weight, x = problem(0)
    config = configure(name, **PATTERNS[pattern])
    result = PASSES[name].solve(weight, statistics_of(x), config)
    assert result.weight.shape == result.mask.shape == weight.shape
    assert result.weight.dtype == torch.float32
    assert result.mask.dtype == torch.bool
    assert torch.isfinite(result.weight).all()
    assert (result.weight[~result.mask] == 0).all()
    assert (result.weight[result.mask] != 0).all()  # random weights: nothing else is zero
    if config.nm is not None:
        assert (result.mask.unflatten(-1, (-1, config.nm[1])).sum(-1) == config.nm[0]).all()
    elif config.scope == "row":
        assert (result.mask.sum(1) == round(config.kept * SIZE)).all()
    else:
        assert int(result.mask.sum()) == round(config.kept * ROWS * SIZE)


@pytest.mark.parametrize("block_size", [1, 5, 7, 24])
@pytest.mark.parametrize("pattern", ["row", "layer"])
def test_sparsegpt_counts_are_exact_for_every_block_size(pattern: str, block_size: int) -> None:
    weight, x = problem(1)
    result = solve("sparsegpt", weight, statistics_of(x), **{**PATTERNS[pattern], "block_size": block_size})
    if pattern == "row":
        assert (result.mask.sum(1) == round(0.4 * SIZE)).all()
    else:
        assert int(result.mask.sum()) == round(0.3 * ROWS * SIZE)


@pytest.mark.parametrize("name", PRUNERS)
def test_solvers_are_pure_and_deterministic(name: str) -> None:
    weight, x = problem(2)
    x[:, 3] = 0
    statistics = statistics_of(x)
    weight_before, hessian_before = weight.clone(), statistics.hessian.clone()
    first, second = (solve(name, weight, statistics) for _ in range(2))
    assert torch.equal(weight, weight_before)
    assert torch.equal(statistics.hessian, hessian_before)
    assert statistics.tokens == len(x)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)
    assert first.stats == second.stats


@pytest.mark.parametrize("name", PRUNERS)
def test_rows_are_solved_alone(name: str) -> None:
    weight, x = problem(3)
    statistics = statistics_of(x)
    # The density of ADMM's gradual mask is shared by the layer's rows; without a ramp rows are independent.
    whole = solve(name, weight, statistics, ramp=1)
    halves = [solve(name, part, statistics, ramp=1) for part in weight.split(ROWS // 2)]
    assert torch.equal(whole.mask, torch.cat([half.mask for half in halves]))
    torch.testing.assert_close(whole.weight, torch.cat([half.weight for half in halves]))


@pytest.mark.parametrize("pattern", ["2:4", "row"])
@pytest.mark.parametrize("seed", range(6))
def test_better_methods_leave_less_error(seed: int, pattern: str) -> None:
    weight, x = problem(seed, tokens=512, size=64, rows=32)
    settings = {"pattern": "2:4"} if pattern == "2:4" else {"pattern": "unstructured", "density": 0.5}
    statistics = statistics_of(x)
    magnitude, wanda, sparsegpt, admm = (
        output_error(x, weight, solve(name, weight, statistics, **settings).weight)
        for name in ("magnitude", "wanda", "sparsegpt", "admm")
    )
    assert magnitude >= wanda >= sparsegpt >= admm > 0


@pytest.mark.parametrize("name", PRUNERS)
def test_dead_inputs_are_harmless_and_go_first(name: str) -> None:
    weight, x = problem(4)
    dead = [0, 5, 6, 17]
    x[:, dead] = 0
    result = solve(name, weight, statistics_of(x))
    assert torch.isfinite(result.weight).all()
    if PASSES[name].needs != "nothing":
        assert not result.mask[:, dead].any()
    if PASSES[name].needs == "hessian":
        weight[:, dead] = torch.randn(ROWS, len(dead))  # what they multiply is zero, so it must not matter
        assert torch.equal(solve(name, weight, statistics_of(x)).weight, result.weight)


@pytest.mark.parametrize("name", PRUNERS)
def test_groups_of_dead_inputs_keep_the_pattern(name: str) -> None:
    weight, x = problem(5)
    x[:, 4:8] = 0
    result = solve(name, weight, statistics_of(x))
    assert torch.isfinite(result.weight).all()
    assert (result.mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("name", PRUNERS)
def test_scaling_inputs_changes_nothing(name: str) -> None:
    weight, x = problem(6)
    expected = solve(name, weight, statistics_of(x))
    for scale in (2.0**-20, 2.0**20):
        scaled = solve(name, weight, statistics_of(x * scale))
        assert torch.equal(scaled.mask, expected.mask)
        torch.testing.assert_close(scaled.weight, expected.weight)


@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 0.01])
@pytest.mark.parametrize("tokens", [1, 4, 16, 23])
@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
def test_fewer_tokens_than_inputs_are_enough(name: str, tokens: int, damping: float) -> None:
    for seed in range(4):
        weight, x = problem(seed, tokens=tokens, size=64)
        result = solve(name, weight, statistics_of(x), damping=damping)
        assert torch.isfinite(result.weight).all()
        assert result.stats["damping"] >= damping * 0.999
        assert (result.mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
def test_non_finite_hessians_raise(name: str, bad: float) -> None:
    weight, x = problem(0)
    x[3, 5] = bad
    with pytest.raises(HessianError, match="non-finite"):
        solve(name, weight, statistics_of(x))


# --- magnitude and wanda ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_magnitude_equals_the_loop(pattern: str, tied: bool) -> None:
    weight, x = problem(7)
    if tied:
        weight = weight.round()
    config = configure("magnitude", **PATTERNS[pattern])
    result = PASSES["magnitude"].solve(weight, statistics_of(x), config)
    expected = naive_keep([[abs(value) for value in row] for row in weight.tolist()], config)
    assert result.mask.tolist() == expected
    assert torch.equal(result.weight, torch.where(torch.tensor(expected), weight, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_wanda_equals_the_loop(pattern: str, tied: bool) -> None:
    weight, x = problem(8, tokens=64)
    if tied:
        weight, x = weight.round(), x.sign()  # every column has norm 1 and most scores tie
    config = configure("wanda", **PATTERNS[pattern])
    result = PASSES["wanda"].solve(weight, statistics_of(x), config)
    norms = [sum(value**2 for value in column) ** 0.5 for column in x.T.tolist()]
    score = [[abs(value) * norm for value, norm in zip(row, norms, strict=True)] for row in weight.tolist()]
    expected = naive_keep(score, config)
    assert result.mask.tolist() == expected
    assert torch.equal(result.weight, torch.where(torch.tensor(expected), weight, 0))


def test_wanda_needs_only_norms() -> None:
    weight, x = problem(9)
    norms = InputStatistics(SIZE, hessian=False, device=CPU)
    norms.add(x)
    assert torch.equal(solve("wanda", weight, norms).weight, solve("wanda", weight, statistics_of(x)).weight)


# --- sparsegpt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 4},
        {"pattern": "1:4", "block_size": 8},
        {"pattern": "4:8", "damping": 0.1},
        {"pattern": "1:3", "block_size": 9},
        {"pattern": "unstructured", "density": 0.5},
        {"pattern": "unstructured", "density": 0.35, "block_size": 7},
        {"pattern": "unstructured", "density": 0.5, "scope": "layer"},
        {"pattern": "unstructured", "density": 0.35, "block_size": 7, "scope": "layer"},
    ],
    ids=str,
)
def test_sparsegpt_equals_textbook_obs(settings: dict[str, Any], seed: int) -> None:
    weight, x = problem(seed)
    config = SparseGPTConfig(**settings, refine=0)
    statistics = statistics_of(x)
    result = PASSES["sparsegpt"].solve(weight, statistics, config)
    expected, keep = naive_obs(weight, statistics.hessian, config)
    assert np.array_equal(result.mask.numpy(), keep)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_sparsegpt_nm_does_not_depend_on_the_block_size(pattern: str) -> None:
    weight, x = problem(10, size=64)
    statistics = statistics_of(x)
    reference = solve("sparsegpt", weight, statistics, pattern=pattern)
    for block_size in (8, 16, 24, 40, 64):
        result = solve("sparsegpt", weight, statistics, pattern=pattern, block_size=block_size)
        assert torch.equal(result.mask, reference.mask)
        torch.testing.assert_close(result.weight, reference.weight, rtol=1e-4, atol=1e-5)
        assert result.stats == pytest.approx(reference.stats, rel=1e-4)


@pytest.mark.parametrize("block_size", [8, 128])
def test_sparsegpt_reports_the_objective_it_reached(block_size: int) -> None:
    weight, x = problem(11)
    statistics = statistics_of(x)
    result = solve("sparsegpt", weight, statistics, block_size=block_size, refine=0)
    hessian = statistics.hessian.double()
    hessian += result.stats["damping"] * hessian.diagonal().mean() * torch.eye(SIZE)
    change = (result.weight - weight).double()
    assert result.stats["obs_loss"] == pytest.approx(float((change @ hessian * change).sum()) / 2, rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_refines_towards_the_least_squares_of_its_mask(pattern: str) -> None:
    weight, x = problem(15)
    statistics = statistics_of(x)
    results = [
        solve("sparsegpt", weight, statistics, **PATTERNS[pattern], refine=steps) for steps in (0, 1, 3, 10, 300)
    ]
    hessian = statistics.hessian.double()
    hessian += results[0].stats["damping"] * hessian.diagonal().mean() * torch.eye(SIZE)
    losses = []
    for result in results:
        assert torch.equal(result.mask, results[0].mask)
        change = (result.weight - weight).double()
        losses.append(float((change @ hessian * change).sum()))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
    expected = least_squares(weight, hessian, results[0].mask)
    torch.testing.assert_close(results[-1].weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_sparsegpt_on_uncorrelated_inputs_changes_no_weight_it_keeps() -> None:
    weight, x = problem(12)
    result = solve("sparsegpt", weight, statistics_of(torch.eye(SIZE)))
    assert torch.equal(result.mask, solve("magnitude", weight, statistics_of(x)).mask)
    torch.testing.assert_close(result.weight, weight * result.mask)
