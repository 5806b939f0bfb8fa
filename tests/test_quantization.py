"""Integer grids, the quantizing sweep and coordinate descent, against slow independent references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.compress.passes import PASSES, PruneResult
from halfweight.compress.passes.descent import descend
from halfweight.compress.passes.hessian import HessianError, inverse_upper_factor
from halfweight.compress.passes.quantization import (
    CodeRange,
    Grid,
    find_grids,
    grid_values,
    quantize,
    round_to_grid,
    spread_grid,
)
from halfweight.compress.passes.sweep import Span, blocks_of, group_order, sweep
from halfweight.compress.statistics import InputStatistics
from halfweight.serving.storage import dense_weight, pack_weight
from problems import output_error, problem, statistics_of

ROWS, SIZE = 6, 40
KINDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


def solve(name: str, weight: Tensor, statistics: InputStatistics, **settings: Any) -> PruneResult:
    return PASSES[name].solve(weight, statistics, PASSES[name].config(**settings))


def weighted_cost(weight: Tensor, importance: Tensor, grid: Grid, codes: CodeRange) -> Tensor:
    wide = Grid(grid.scales[..., None], grid.zeros[..., None])
    return (importance * (grid_values(round_to_grid(weight, wide, codes), wide) - weight).square()).sum(-1)


# --- grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, symmetric", KINDS)
def test_code_ranges_have_the_bits_and_hold_the_zero(bits: int, symmetric: bool) -> None:
    codes = CodeRange.of(bits, symmetric)
    assert codes.high - codes.low + 1 == 2**bits
    assert codes.low >= 0
    assert codes.high < (16 if bits <= 4 else 256)
    if symmetric:
        assert codes.zero == (8 if bits <= 4 else 128)
        assert codes.low <= codes.zero <= codes.high


@pytest.mark.parametrize("bits, symmetric", KINDS)
def test_min_max_grids_reach_the_extremes_and_zero(bits: int, symmetric: bool) -> None:
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(bits)) + 0.3
    codes = CodeRange.of(bits, symmetric)
    grid = find_grids(weight, None, codes, candidates=1)
    wide = Grid(grid.scales[:, None], grid.zeros[:, None])
    values = grid_values(round_to_grid(weight, wide, codes), wide)
    # Rounding the zero point moves the whole grid by up to half a step, and fp16 moves the step by 2^-11.
    steps = 0.5 if symmetric else 1.0
    assert ((values - weight).abs() <= (steps + 0.2) * grid.scales[:, None]).all()
    assert (grid.scales == grid.scales.half().float()).all()
    assert (grid.zeros == grid.zeros.round()).all()
    assert (grid_values(round_to_grid(torch.zeros(50, 1), wide, codes), wide) == 0).all()


@pytest.mark.parametrize("bits, symmetric", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_never_loses_to_min_max_and_comes_near_the_best_grid(bits: int, symmetric: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 16, generator=generator) * torch.rand(8, 1, generator=generator).exp()
    importance = torch.rand(16, generator=generator).square()
    codes = CodeRange.of(bits, symmetric)
    plain = weighted_cost(weight, importance, find_grids(weight, importance, codes, candidates=1), codes)
    found = weighted_cost(weight, importance, find_grids(weight, importance, codes, candidates=40), codes)
    assert (found <= plain).all()
    if bits == 8:
        return
    # Every zero point with three hundred scales each.
    best = torch.full((8,), torch.inf)
    width = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    for zero in range(codes.low, codes.high + 1) if codes.zero is None else [codes.zero]:
        for scale in torch.linspace(0.2, 2.0, 300):
            grid = Grid((width * scale).half().float(), torch.full((8,), float(zero)))
            best = torch.minimum(best, weighted_cost(weight, importance, grid, codes))
    assert found.sum() <= 1.4 * best.sum()


def test_groups_of_zeros_get_a_zero_scale() -> None:
    for symmetric in (False, True):
        quantized, values = quantize(torch.zeros(2, 32), None, CodeRange.of(4, symmetric), 16, 10)
        assert (quantized.scales == 0).all()
        assert (values == 0).all()
        assert torch.isfinite(values).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.sampled_from([2, 8, 16, 64]),
    st.integers(1, 70),
    st.floats(-9, 9),
    st.sampled_from([1, 5]),
)
def test_rounding_twice_changes_nothing_and_packs_exactly(
    seed: int, kind: tuple[int, bool], group_size: int, columns: int, scale: float, candidates: int
) -> None:
    bits, symmetric = kind
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, columns, generator=generator) * 2.0**scale
    weight[torch.rand(3, columns, generator=generator) < 0.3] = 0
    codes = CodeRange.of(bits, symmetric)
    quantized, values = quantize(weight, None, codes, group_size, candidates)
    assert (values[weight == 0] == 0).all()
    spread = torch.arange(columns) // group_size
    zeros = torch.full((3, columns), codes.zero or 0) if quantized.zeros is None else quantized.zeros[:, spread]
    grid = Grid(quantized.scales[:, spread].float(), zeros.float())
    assert torch.equal(round_to_grid(values, grid, codes)[grid.scales > 0], quantized.codes.float()[grid.scales > 0])
    scheme = PASSES["rtn"].config(bits=bits, symmetric=symmetric, group_size=group_size).scheme((3, columns))
    packed = pack_weight(values, scheme, quantized)
    assert torch.equal(dense_weight(scheme, packed, (3, columns), torch.float32), values)


# --- the order of a sweep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, group", [(40, 8), (37, 8), (5, 8), (64, 64)])
def test_orders_are_permutations_that_keep_groups_whole(size: int, group: int) -> None:
    importance = torch.rand(size, generator=torch.Generator().manual_seed(size))
    for sort, inside in [(False, False), (True, False), (True, True)]:
        order, spans = group_order(importance, group, sort, inside)
        assert order.sort().values.tolist() == list(range(size))
        assert [span.start for span in spans] == [0, *[span.stop for span in spans[:-1]]]
        means = []
        for span in spans:
            members = order[span.start : span.stop]
            assert set((members // group).tolist()) == {span.group}
            means.append(float(importance[members].mean()))
            if sort and inside:
                assert (importance[members].diff() <= 0).all()
            else:
                assert (members.diff() == 1).all()
        if sort:
            assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 100])
@pytest.mark.parametrize("sizes", [[8] * 5, [8, 8, 5, 8], [40], [3], [16, 16, 1]])
def test_blocks_cover_all_and_cut_only_large_spans(sizes: list[int], block_size: int) -> None:
    stops = np.cumsum(sizes).tolist()
    spans = [Span(stop - size, stop, i) for i, (size, stop) in enumerate(zip(sizes, stops, strict=True))]
    blocks = blocks_of(spans, block_size)
    assert [start for start, _ in blocks] == [0, *[stop for _, stop in blocks[:-1]]]
    assert blocks[-1][1] == stops[-1]
    assert all(0 < stop - start <= block_size for start, stop in blocks)
    for span in spans:
        if span.stop - span.start <= block_size:
            assert sum(span.start < stop and start < span.stop for start, stop in blocks) == 1
        else:
            assert any(start == span.start for start, _ in blocks)


# --- the sweep against textbook GPTQ ---------------------------------------------------------------------------


def textbook_gptq(weight: Tensor, hessian: Tensor, codes: CodeRange, group: int, damping: float) -> np.ndarray:
    """GPTQ in float64, one column at a time, inverting the Hessian of the columns left each time; min-max grids."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    size = w.shape[1]
    h += damping * np.trace(h) / size * np.eye(size)
    scales = zeros = np.zeros(len(w))
    for i in range(size):
        if i % group == 0:
            part = w[:, i : i + group]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            if codes.zero is None:
                width = (high - low) / (codes.high - codes.low)
                zeros = np.clip(np.round(-low / width), codes.low, codes.high)
            else:
                width = np.maximum(-low / (codes.zero - codes.low), high / (codes.high - codes.zero))
                zeros = np.full(len(w), codes.zero)
            scales = width.astype(np.float16).astype(np.float64)
        value = (np.clip(np.round(w[:, i] / scales + zeros), codes.low, codes.high) - zeros) * scales
        inverse = np.linalg.inv(h[i:, i:])
        error = (w[:, i] - value) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i] = value
    return w


def gptq_along_outputs(
    weight: Tensor, hessian: Tensor, codes: CodeRange, group: int, damping: float, block: int
) -> np.ndarray:
    """As `textbook_gptq`, with groups of rows, whose grids are found for `block` columns at a time."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    rows, size = w.shape
    h += damping * np.trace(h) / size * np.eye(size)
    grids: dict[tuple[int, int], Grid] = {}
    for i in range(size):
        if i % block == 0:
            for column in range(i, min(i + block, size)):
                for first in range(0, rows, group):
                    part = torch.from_numpy(w[first : first + group, column]).float()
                    grids[first, column] = find_grids(part, None, codes, 1)
        value = w[:, i].copy()
        for first in range(0, rows, group):
            scale, zero = (float(number) for number in grids[first, i])
            part = value[first : first + group]
            value[first : first + group] = (
                np.clip(np.round(part / scale + zero), codes.low, codes.high) - zero
            ) * scale
        inverse = np.linalg.inv(h[i:, i:])
        error = (w[:, i] - value) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i] = value
    return w


@pytest.mark.parametrize("block_size", [1, 8, 100])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [2, 4, 16])
def test_the_sweep_along_outputs_is_gptq(group: int, symmetric: bool, block_size: int) -> None:
    weight, x = problem(group, size=SIZE)
    hessian, codes = statistics_of(x).hessian, CodeRange.of(4, symmetric)
    order, spans = group_order(hessian.diagonal(), 1, True)
    hessian = hessian[order][:, order]
    upper, _ = inverse_upper_factor(hessian.clone(), 0.01)
    swept = sweep(weight, upper, order, spans, codes=codes, candidates=1, block_size=block_size, outputs=group)
    expected = torch.from_numpy(gptq_along_outputs(weight[:, order], hessian, codes, group, 0.01, block_size)).float()
    same = ((swept.weight[:, order] - expected).abs() < 1e-4 * expected.abs().max()).all(1)
    assert int(same.sum()) >= ROWS - 1
    values = grid_values(swept.codes.T, spread_grid(swept.grid, group, ROWS))
    assert torch.equal(values.T, swept.weight)


@pytest.mark.parametrize("block_size", [1, 4, 8, 13, 100])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [8, 16, 64])
def test_the_sweep_is_gptq(group: int, symmetric: bool, block_size: int) -> None:
    weight, x = problem(group, size=SIZE)
    hessian, codes = statistics_of(x).hessian, CodeRange.of(4, symmetric)
    order, spans = group_order(hessian.diagonal(), group, False, False)
    upper, _ = inverse_upper_factor(hessian.clone(), 0.01)
    swept = sweep(weight, upper, order, spans, codes=codes, candidates=1, block_size=block_size)
    expected = torch.from_numpy(textbook_gptq(weight, hessian, codes, group, 0.01)).float()
    # A number that lies between two grid points to within rounding may fall either way; then its row differs.
    same = ((swept.weight - expected).abs() < 1e-4 * expected.abs().max()).all(1)
    assert int(same.sum()) >= ROWS - 1
    spread = torch.arange(SIZE) // group
    values = grid_values(swept.codes, Grid(swept.grid.scales[:, spread], swept.grid.zeros[:, spread]))
    assert torch.equal(values, swept.weight)


def test_activation_order_is_the_sweep_of_permuted_columns() -> None:
    weight, x = problem(1, size=SIZE)
    hessian, codes = statistics_of(x).hessian, CodeRange.of(4, False)
    order, spans = group_order(hessian.diagonal(), 8, True, True)
    upper, _ = inverse_upper_factor(hessian[order][:, order], 0.01)
    swept = sweep(weight, upper, order, spans, codes=codes, candidates=1, block_size=16)
    expected = torch.from_numpy(textbook_gptq(weight[:, order], hessian[order][:, order], codes, 8, 0.01)).float()
    same = ((swept.weight[:, order] - expected).abs() < 1e-4 * expected.abs().max()).all(1)
    assert int(same.sum()) >= ROWS - 1


# --- coordinate descent ----------------------------------------------------------------------------------------


def loss(weight: Tensor, hessian: Tensor, values: Tensor) -> float:
    delta = (values - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())


@pytest.mark.parametrize("along_outputs", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(
    masked: bool, symmetric: bool, along_outputs: bool
) -> None:
    weight, x = problem(3, size=SIZE)
    hessian, codes = statistics_of(x).hessian, CodeRange.of(4, symmetric)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    group = 4 if along_outputs else 8

    def turned(matrix: Tensor) -> Tensor:
        return matrix.T if along_outputs else matrix

    start, _ = quantize(turned(weight if mask is None else weight * mask).contiguous(), None, codes, group, 1)
    zeros = torch.full_like(start.scales, 8) if start.zeros is None else start.zeros
    rounded, grid = turned(start.codes.float()), Grid(start.scales.float(), zeros.float())
    before = torch.inf
    for rounds in (0, 1, 2, 5, 60):
        better, moved, begun, ended = descend(
            *(weight, hessian, rounded, grid, mask),
            allowed=codes,
            group_size=group,
            rounds=rounds,
            along_outputs=along_outputs,
        )
        wide = spread_grid(moved, group, ROWS if along_outputs else SIZE)
        wide = Grid(turned(wide.scales), turned(wide.zeros))
        values = grid_values(better, wide)
        now = loss(weight, hessian, values)
        assert now <= before * (1 + 1e-5)
        assert ended == pytest.approx(now, rel=1e-4)
        assert begun >= ended * (1 - 1e-6)
        before = now
        assert (moved.scales == moved.scales.half().float()).all()
        assert (better >= codes.low).all()
        assert (better <= codes.high).all()
        if mask is not None:
            assert (values[~mask] == 0).all()
    for row in range(ROWS):
        for column in range(SIZE):
            if mask is not None and not mask[row, column]:
                continue
            for step in (-1, 1):
                trial = better.clone()
                trial[row, column] = (trial[row, column] + step).clamp(codes.low, codes.high)
                assert loss(weight, hessian, grid_values(trial, wide)) >= before * (1 - 1e-5)


# --- the passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("bits, symmetric", KINDS)
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_results_are_what_is_stored(name: str, bits: int, symmetric: bool, along: str) -> None:
    weight, x = problem(0, size=SIZE)
    config = PASSES[name].config(bits=bits, symmetric=symmetric, group_size=16 if along == "inputs" else 4, along=along)
    before = weight.clone()
    statistics = statistics_of(x)
    result, again = (PASSES[name].solve(weight, statistics, config) for _ in range(2))
    assert torch.equal(weight, before)
    assert torch.equal(result.weight, again.weight)
    assert result.mask.all()
    scheme = config.scheme((ROWS, SIZE))
    assert scheme.integers is not None
    assert (scheme.integers.bits, scheme.integers.symmetric) == (8 if bits == 8 else 4, symmetric)
    packed = pack_weight(result.weight, scheme, result.quantized, result.mask)
    assert torch.equal(dense_weight(scheme, packed, (ROWS, SIZE), torch.float32), result.weight)
    assert result.quantized is not None
    assert len(result.quantized.codes.unique()) <= 2**bits


@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_each_part_of_gptq_pays(along: str) -> None:
    problems = [problem(seed, tokens=512, size=64, rows=32) for seed in range(6)]

    def error(name: str, **settings: Any) -> float:
        """Mean over the problems of the relative output error."""
        errors = []
        for weight, x in problems:
            result = solve(name, weight, statistics_of(x), group_size=16, along=along, **settings)
            errors.append(output_error(x, weight, result.weight) / output_error(x, weight, torch.zeros_like(weight)))
        return float(np.mean(errors))

    rtn = error("rtn", candidates=1)
    swept = error("gptq", candidates=1, descents=0, activation_order=False)
    searched = error("gptq", descents=0)
    descended = error("gptq")
    assert rtn > swept > searched > descended > 0
    assert error("gptq", bits=8) < 0.02 * descended
    assert error("gptq", bits=3) > 2 * descended


def test_rows_are_solved_alone() -> None:
    weight, x = problem(3, size=SIZE)
    statistics = statistics_of(x)
    whole = solve("gptq", weight, statistics, group_size=8)
    halves = [solve("gptq", part, statistics, group_size=8) for part in weight.split(ROWS // 2)]
    torch.testing.assert_close(whole.weight, torch.cat([half.weight for half in halves]))


def test_dead_inputs_are_harmless() -> None:
    weight, x = problem(4, size=SIZE)
    dead = [0, 5, 6, 17]
    x[:, dead] = 0
    result = solve("gptq", weight, statistics_of(x), group_size=8)
    assert torch.isfinite(result.weight).all()
    weight[:, dead] = torch.randn(ROWS, len(dead))  # what they multiply is zero, so it must not matter
    assert torch.equal(solve("gptq", weight, statistics_of(x), group_size=8).weight, result.weight)


def test_non_finite_hessians_raise() -> None:
    weight, x = problem(0, size=SIZE)
    x[3, 5] = torch.nan
    with pytest.raises(HessianError, match="non-finite"):
        solve("gptq", weight, statistics_of(x))


@pytest.mark.parametrize("tokens", [1, 8, 39])
def test_fewer_tokens_than_inputs_are_enough(tokens: int) -> None:
    weight, x = problem(0, tokens=tokens, size=SIZE)
    assert torch.isfinite(solve("gptq", weight, statistics_of(x)).weight).all()
