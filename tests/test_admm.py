"""ADMM and its conjugate-gradient finish against direct solves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from halfweight.compress.passes import ADMMConfig
from halfweight.compress.passes.admm.solver import gradual_mask
from halfweight.compress.passes.least_squares import conjugate_gradient
from halfweight.compress.passes.masks import pattern_mask
from problems import (
    PATTERNS,
    ROWS,
    SIZE,
    configure,
    least_squares,
    problem,
    solve,
    statistics_of,
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_admm_ends_at_the_least_squares_of_its_mask(pattern: str, damping: float) -> None:
    weight, x = problem(13)
    x[:, 2] = 0
    statistics = statistics_of(x)
    result = solve("admm", weight, statistics, **PATTERNS[pattern], refine=300, damping=damping)
    weight[:, 2] = 0
    hessian = statistics.hessian.double()
    hessian[2, 2] = hessian.diagonal()[[j for j in range(SIZE) if j != 2]].mean()
    hessian += damping * hessian.diagonal().diag()  # damping is relative to each input's own mean square
    expected = least_squares(weight, hessian, result.mask)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=2e-5)


def test_admm_refinement_only_improves_the_weights() -> None:
    weight, x = problem(14)
    statistics = statistics_of(x)
    hessian = statistics.hessian.double()
    hessian += 0.1 * hessian.diagonal().diag()
    losses = []
    for refine in (0, 1, 3, 10, 50):
        result = solve("admm", weight, statistics, refine=refine)
        change = (result.weight - weight).double()
        losses.append(float((change @ hessian * change).sum()))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_admm_on_uncorrelated_inputs_changes_no_weight_it_keeps() -> None:
    weight, x = problem(15)
    # With the penalty equal to the damped diagonal, a weight's score is the same inside and outside the mask.
    result = solve("admm", weight, statistics_of(torch.eye(SIZE)), penalty=1.1, damping=0.1)
    assert torch.equal(result.mask, solve("magnitude", weight, statistics_of(x)).mask)
    torch.testing.assert_close(result.weight, weight * result.mask)


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradient_equals_a_direct_solve(seed: int) -> None:
    weight, x = problem(seed)
    hessian = statistics_of(x).hessian.double()
    norm = hessian.diagonal().sqrt()
    hessian = hessian / norm / norm[:, None] + 0.05 * torch.eye(SIZE)
    mask = torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0], mask[1] = True, False
    start = torch.where(mask, weight, 0).double()

    def solved(dtype: torch.dtype, steps: int) -> torch.Tensor:
        residual = ((weight - start) @ hessian * mask).to(dtype)
        return start.to(dtype) + conjugate_gradient(residual, hessian.to(dtype), mask, steps)

    solution = solved(torch.float64, 200)
    torch.testing.assert_close(solution, least_squares(weight, hessian, mask), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution[0], weight[0].double())  # nothing pruned: the weights themselves
    assert (solution[~mask] == 0).all()
    # In fp32, far more steps than inputs neither drift nor produce NaN.
    torch.testing.assert_close(solved(torch.float32, 1000).double(), solution, rtol=1e-3, atol=1e-5)


def test_conjugate_gradient_stays_where_nothing_is_left_to_do() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    residual = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert (conjugate_gradient(torch.zeros(2, 8), torch.eye(8), mask, 5) == 0).all()
    assert (conjugate_gradient(residual.clone(), torch.eye(8), mask, 0) == 0).all()
    assert torch.equal(conjugate_gradient(residual.clone(), torch.eye(8), mask, 5), residual)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradual_masks_follow_the_cubic_schedule(pattern: str) -> None:
    ramp = 8
    config = configure("admm", **PATTERNS[pattern], iterations=12, ramp=ramp)
    assert isinstance(config, ADMMConfig)
    score = torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(0))
    target = pattern_mask(score, config)
    for step in range(1, config.iterations + 1):
        mask = gradual_mask(score, config, step)
        pruned = 1 - (1 - min(step / ramp, 1)) ** 3
        kept = round((1 - (1 - config.kept) * pruned) * score.numel())
        assert int(mask.sum()) == max(kept, int(target.sum()))  # each row's count is rounded, up here
        assert not (target & ~mask).any()
        rest = score[mask & ~target]
        assert not len(rest) or rest.min() > score[~mask].max()  # the best of what the pattern drops
        assert step < ramp or torch.equal(mask, target)
    half = gradual_mask(score, config, ramp // 2)
    assert int((~half).sum()) == pytest.approx(0.875 * (1 - config.kept) * score.numel(), abs=0.6)


def test_gradual_masks_of_equal_scores_still_end_at_the_pattern() -> None:
    config = ADMMConfig(iterations=3, ramp=3)
    for score in (torch.zeros(2, 8), torch.ones(2, 8)):
        assert gradual_mask(score, config, 3).tolist() == [[True, True, False, False] * 2] * 2
        assert (gradual_mask(score, config, 1) | ~gradual_mask(score, config, 3)).all()
