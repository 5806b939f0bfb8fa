"""Group-sparse int4 on GPUs: interpreted kernels against an fp64 reference, bytes, schedules, machine code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import FormatError, groups, groups_layer
from halfweight.triton_kernels.formats.groups import Groups, KeptGroups
from halfweight.triton_kernels.formats.groups_layer import LayerGroups
from halfweight.triton_kernels.group_int4 import layout, op, plan, reference
from halfweight.triton_kernels.group_int4.schedule import schedule
from halfweight.triton_kernels.launch import NVIDIA, Shape

pytest.importorskip("triton")

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

TARGET = "sm_90"
DTYPES = (torch.float16, torch.bfloat16)
KERNELS = {kernel.name.partition(".")[2]: kernel for kernel in op.KERNELS}
SIZES = (8, 16, 32, 64)


def random_entries(numbers: Tensor, group_size: int) -> KeptGroups:
    generator = torch.Generator().manual_seed(numbers.numel())
    shape = tuple(numbers.shape)
    return KeptGroups(
        torch.randint(16, (*shape, group_size), generator=generator, dtype=torch.uint8),
        (torch.rand(shape, generator=generator) + 0.1).half(),
        torch.randint(16, shape, generator=generator, dtype=torch.uint8),
        numbers,
    )


def by_row(n: int, k: int, size: int, kept: int, segments: int = 1, lead: tuple[int, ...] = ()) -> Groups:
    generator = torch.Generator().manual_seed(n + k)
    per_segment = -(-k // size) // segments
    picks = torch.rand(*lead, n, segments, per_segment, generator=generator).argsort(-1)[..., : kept // segments]
    numbers = picks.sort(-1).values + torch.arange(segments)[:, None] * per_segment
    return groups.pack(random_entries(numbers.flatten(-2), size), k, segments=segments)


def by_layer(counts: list[int], k: int, size: int) -> LayerGroups:
    generator = torch.Generator().manual_seed(k)
    total = -(-k // size)
    picks = [torch.randperm(total, generator=generator)[:count].sort().values for count in counts]
    row_start = torch.tensor([0, *counts]).cumsum(0).int()
    return groups_layer.pack(random_entries(torch.cat(picks), size), row_start, k)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))).to(dtype)


def run(name: str, x: Tensor, prepared: layout.Prepared, bias: Tensor | None = None) -> Tensor:
    """y (fp32, poisoned with NaN beforehand) of one interpreted launch; every tensor between red zones."""
    y = guarded(torch.full((x.shape[0], prepared.rows), float("nan")))
    tensors = {key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    x, bias = guarded(op.pad_columns(x, prepared.group)), None if bias is None else guarded(bias)
    interpret(KERNELS[name].jit(), op.PLANS[name](x, prepared._replace(**tensors), y, bias, TARGET))
    return y


def run_expand(prepared: layout.Prepared) -> Tensor:
    weight = guarded(torch.zeros((prepared.rows, prepared.columns)))
    interpret(KERNELS["expand"].jit(), plan.plan_expand(prepared, weight, TARGET))
    return weight


def error(y: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "m"), [("fragment", m) for m in (*range(1, 10), 16, 33, 63)] + [("simt", m) for m in (*range(1, 10), 16)]
)
def test_any_number_of_tokens(name: str, m: int) -> None:
    packed, x = by_row(16, 128, 16, 4), inputs(m, 128, DTYPES[m % 2])
    assert error(run(name, x, layout.prepare(packed, 128)), reference.linear(x.double(), packed)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fragment", "simt"])
@pytest.mark.parametrize("segments", [1, 2])
def test_group_sizes_and_segments(name: str, size: int, segments: int) -> None:
    k = 16 * size
    packed = by_row(20, k, size, 10, segments)
    bias = torch.randn(20, generator=torch.Generator().manual_seed(0)).half()
    x = inputs(1, k, DTYPES[segments % 2])
    expected = reference.linear(x.double(), packed, segments=segments, bias=bias)
    assert error(run(name, x, layout.prepare(packed, k, segments=segments), bias), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_balanced_over_the_layer(name: str, size: int) -> None:
    k = 9 * size - 3  # the last group is cut
    packed = by_layer([0, 9, 1, 4, 8, *[3] * 15, 0, 5], k, size)
    x = inputs(2, k)
    assert error(run(name, x, layout.prepare_layer(packed, k)), reference.linear(x.double(), packed)) < 1e-5


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_rows_without_groups_give_the_bias(name: str) -> None:
    bias = torch.randn(3, generator=torch.Generator().manual_seed(0))
    for prepared in (
        layout.prepare(by_row(3, 64, 16, 0), 64),
        layout.prepare_layer(by_layer([0, 0, 0], 64, 16), 64),
    ):
        assert torch.equal(run(name, inputs(1, 64), prepared, bias), bias[None])
        assert torch.equal(run(name, inputs(1, 64), prepared), torch.zeros(1, 3))


@pytest.mark.parametrize("size", SIZES)
def test_expanding_is_exact_in_fp32(size: int) -> None:
    k = 9 * size - 3
    packed = by_row(19, k, size, 5)
    assert torch.equal(run_expand(layout.prepare(packed, k)), groups.dequantize(packed, k))
    layer = by_layer([0, 9, 1, *[3] * 15], k, size)
    assert torch.equal(run_expand(layout.prepare_layer(layer, k)), groups_layer.dequantize(layer, k))


def test_a_slice_of_tiles_is_a_weight() -> None:
    packed = by_row(40, 128, 16, 4)
    prepared = layout.prepare(packed, 128)
    parts = [run_expand(op.rows_of(prepared, first, first + 2)) for first in (0, 2)]
    assert torch.equal(torch.cat(parts), groups.dequantize(packed, 128))


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_large_bfloat16_activations(name: str) -> None:
    packed, x = by_row(16, 128, 16, 4), inputs(2, 128, torch.bfloat16, scale=1e4)
    x[0, :16] = 3e4
    assert error(run(name, x, layout.prepare(packed, 128)), reference.linear(x.double(), packed)) < 1e-5


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_tokens_do_not_see_each_other(name: str) -> None:
    prepared, x = layout.prepare(by_row(16, 128, 16, 4), 128), inputs(4, 128)
    clean = run(name, x, prepared)
    x[1], x[3, 7] = float("nan"), float("inf")
    assert torch.equal(run(name, x, prepared)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_dropped_columns_are_not_used(name: str) -> None:
    """Whatever lies in columns that a row does not keep cannot reach it, not even through its tile."""
    packed, x = by_row(16, 128, 16, 4), inputs(1, 128)
    dense = groups.dequantize(packed, 128)
    clean = run(name, x, layout.prepare(packed, 128))
    x[:, :16] = float("nan")
    unaffected = (dense[:, :16] == 0).all(1)
    assert 0 < int(unaffected.sum()) < 16
    assert torch.equal(run(name, x, layout.prepare(packed, 128))[:, unaffected], clean[:, unaffected])


def test_one_expert_of_a_stack() -> None:
    packed, x = by_row(18, 64, 16, 2, lead=(2,)), inputs(1, 64)
    for expert in range(2):
        expected = reference.linear(x.double(), Groups(*(tensor[expert] for tensor in packed)))
        assert error(run("fragment", x, layout.prepare(packed, 64).expert(expert)), expected) < 1e-5


@given(
    st.sampled_from([(), (1,), (2, 3)]), st.integers(1, 40), st.integers(0, 9), st.sampled_from(SIZES), st.booleans()
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_layout_round_trip(lead: tuple[int, ...], n: int, kept: int, size: int, cut: bool) -> None:
    k = 9 * size - 3 * cut
    packed = by_row(n, k, size, kept, lead=lead)
    prepared = layout.prepare(packed, k)
    shapes = layout.prepared_shapes((*lead, n, k), group_size=size, kept=kept)
    assert {key: tuple(getattr(prepared, key).shape) for key in shapes} == shapes
    assert all(torch.equal(a, b) for a, b in zip(layout.restore(prepared), packed, strict=True))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.sampled_from(SIZES))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_layer_layout_round_trip(counts: list[int], size: int) -> None:
    packed = by_layer(counts, 9 * size - 3, size)
    restored = layout.restore_layer(layout.prepare_layer(packed, 9 * size - 3))
    assert all(torch.equal(a, b) for a, b in zip(restored, packed, strict=True))


def test_rows_too_wide_to_number_are_refused() -> None:
    with pytest.raises(FormatError, match="too few for K"):
        layout.check_width(65537, 16)
    assert not plan.can_run((64, 65537), torch.float16, TARGET)[0]


@pytest.mark.parametrize("spread", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("rows", [1024, 4096, 14336])
def test_workers_are_balanced(rows: int, spread: float) -> None:
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(rows))
    counts = (256 * (0.5 + spread * noise)).clamp(0, 256).long()
    plan_ = schedule(counts, 4)
    assert plan_.imbalance <= 1.05
    assert sorted(plan_.order.tolist()) == list(range(rows))
    # Little padding, and enough workers to fill a large GPU where there are rows for it.
    assert int(plan_.unit_start[-1]) * 4 * 16 <= 1.03 * int(counts.sum())
    assert len(plan_.worker_start) - 1 >= min(128, rows // 48)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("fragment", (1, 64, 512)), ("fragment", (4, 64, 256)), ("simt", (2, 64, 512)), ("expand", (64, 64, 256))],
)
def test_every_byte_is_read_once(name: str, shape: tuple[int, int, int]) -> None:
    kernel, sizes = KERNELS[name], Shape(*shape)
    metering = meter(kernel.jit(), kernel.sample(sizes, torch.float16, TARGET))
    assert metering.dram_bytes == kernel.bytes(sizes, torch.float16)
    assert metering.dram_bytes <= 1.03 * kernel.minimum_bytes(sizes, torch.float16)
    assert metering.imbalance <= 1.1
    assert metering.atomics == 0


def test_the_kernel_fits_the_machine() -> None:
    half = torch.float16
    assert [plan.choose(m, 64, 64, half, "sm_90") for m in (1, 63, 64)] == ["fragment", "fragment", "expand"]
    assert [plan.choose(m, 64, 64, half, "gfx942") for m in (1, 16, 17)] == ["simt", "simt", "expand"]
    assert plan.choose(8, 64, 64, half, "sm_90", asm=False) == "simt"
    assert plan.can_run((64, 64), half, "sm_80") == (True, "")
    assert not plan.can_run((64, 64), torch.float32, "sm_80")[0]
    assert plan.count_warps(256, 32, 2) == 8 and plan.count_warps(4096, 32, 2) == 1 and plan.count_warps(9, 3, 2) == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("m", [1, 8])
def test_machine_code(m: int, target: str) -> None:
    kernel, shape = KERNELS["fragment"], Shape(m, 4096, 4096)
    for dtype in DTYPES:
        launch = kernel.example(shape, dtype, target)
        binary = aot.compile_launch(kernel.jit(), launch, target)
        assert binary.spills == 0 and aot.misplaced_fragments(binary.ttgir) == []
        cost = aot.instructions_per_weight(launch, binary, kernel.weights(shape), kernel.weight_bytes(shape, dtype))
        assert cost <= (3.9 if m == 1 else 12.0)


def test_assembly_is_for_nvidia_only() -> None:
    assert all(set(kernel.targets) <= set(NVIDIA) for kernel in op.KERNELS if kernel.inline_asm)
