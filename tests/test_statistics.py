"""Second moments of inputs, and factoring the Hessians made of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from halfweight.compress.passes.hessian import HessianError, damped_cholesky, inverse_upper_factor
from halfweight.compress.statistics import InputStatistics, add_gram, mirror_upper
from halfweight.serving.errors import RunError
from problems import problem, statistics_of

CPU = torch.device("cpu")
SIZE = 24


# --- hessians --------------------------------------------------------------------------------------------------


def test_damping_is_exactly_the_requested_fraction_when_that_suffices() -> None:
    hessian = statistics_of(problem(0)[1]).hessian
    factor, level = damped_cholesky(hessian, 0.01)
    assert level == 0.01
    expected = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(SIZE)
    torch.testing.assert_close(factor @ factor.T, expected)


def test_damping_escalates_by_powers_of_ten() -> None:
    hessian = torch.ones(16, 16)
    before = hessian.clone()
    factor, level = damped_cholesky(hessian, 1e-10)  # 1 + 1e-10 is 1 in fp32
    assert level in [1e-10 * 10**attempt for attempt in range(1, 5)]
    assert torch.isfinite(factor).all()
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("hessian", [-torch.eye(4), torch.zeros(4, 4)], ids=["negative", "zero"])
def test_hopeless_hessians_raise(hessian: Tensor) -> None:
    with pytest.raises(HessianError, match="even with damping 100"):
        damped_cholesky(hessian, 0.01)


@pytest.mark.parametrize("tokens", [4, 16, 500])
@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-4, 1e-2])
def test_inverse_factors_are_upper_triangular_and_invert(tokens: int, damping: float) -> None:
    for seed in range(4):
        hessian = statistics_of(problem(seed, tokens=tokens, size=64)[1]).hessian
        upper, level = inverse_upper_factor(hessian.clone(), damping)
        assert torch.equal(upper, upper.triu())
        assert (upper.diagonal() > 0).all()
        if level >= 1e-4:
            damped = (hessian + level * hessian.diagonal().mean() * torch.eye(64)).double()
            product = upper.double() @ damped @ upper.double().T
            torch.testing.assert_close(product, torch.eye(64, dtype=torch.float64), rtol=0, atol=0.05)


# --- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 512, 513, 1031])
def test_the_hessian_is_the_mean_outer_product(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(*lead, size, generator=generator) for lead in [(1, 9), (2, 3), (5,), (1, 0)]]
    full, light = (InputStatistics(size, hessian=hessian, device=CPU) for hessian in (True, False))
    for part in parts:
        full.add(part)
        light.add(part)
    x = np.concatenate([part.numpy().reshape(-1, size) for part in parts]).astype(np.float64)
    assert full.tokens == light.tokens == len(x) == 20
    np.testing.assert_allclose(full.hessian.numpy(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(full.hessian, full.hessian.T)
    np.testing.assert_allclose(light.mean_square.numpy(), (x**2).mean(0), rtol=1e-5)
    torch.testing.assert_close(full.mean_square, light.mean_square)
    torch.testing.assert_close(full.mean_square, full.hessian.diagonal())


@pytest.mark.parametrize("tile", [1, 3, 8, 10, 64])
def test_gram_tiles_cover_the_upper_triangle(tile: int) -> None:
    rows = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(10, 10)
    add_gram(total, rows, tile)
    add_gram(total, rows, tile)
    torch.testing.assert_close(mirror_upper(total), 2 * rows.T @ rows)


def test_gram_of_bf16_rows_is_rounded_and_not_biased() -> None:
    rows = torch.randn(512, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(48, 48)
    for part in rows.split(64):
        add_gram(total, part, 16)
    exact = rows.double().T @ rows.double()
    wrong = mirror_upper(total).double() - exact
    assert float(wrong.norm() / exact.norm()) < 2**-9
    assert float(torch.linalg.matrix_norm(wrong, 2)) < 0.01 * float(exact.diagonal().mean()) / 4  # SparseGPT's damping


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_16_bit_inputs_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((100, 4), 3e4).to(dtype)
    statistics = statistics_of(x)
    rtol = 2**-9 if dtype == torch.bfloat16 else 1e-6  # a CPU's bf16 products are rounded once per call
    torch.testing.assert_close(statistics.hessian, torch.full((4, 4), float(x[0, 0]) ** 2), rtol=rtol, atol=0)


def test_diagonal_statistics_have_no_hessian() -> None:
    statistics = InputStatistics(4, hessian=False, device=CPU)
    with pytest.raises(ValueError, match="without a Hessian"):
        _ = statistics.hessian


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(7, 4), "no non-zero input in 7 calibration tokens"),
        (torch.zeros(0, 4), "no non-zero input in 0 calibration tokens"),
        (torch.tensor([[1.0, float("nan"), 1, 1]] * 5), "not finite after 5 calibration tokens"),
        (torch.tensor([[1.0, float("-inf"), 1, 1]] * 3), "not finite after 3 calibration tokens"),
    ],
)
def test_unusable_statistics_name_the_module_and_the_tokens(x: Tensor, message: str, hessian: bool) -> None:
    statistics = InputStatistics(4, hessian=hessian, device=CPU)
    statistics.add(x)
    with pytest.raises(RunError, match=rf"^model\.layers\.0\.q_proj: .*{re.escape(message)}") as error:
        statistics.require_usable("model.layers.0.q_proj")
    assert "\n" not in str(error.value)


def test_one_non_zero_input_is_usable() -> None:
    statistics_of(torch.tensor([[0.0, 0, 1e-3, 0]])).require_usable("q_proj")
