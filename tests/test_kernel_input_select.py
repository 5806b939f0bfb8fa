"""Input-selected 16-bit linears: interpreted kernels against an fp64 reference, bytes metered, machine code read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats.bits import to_bits
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.input_select import layout, op, plan, reference, split
from halfweight.triton_kernels.input_select.op import KERNELS
from halfweight.triton_kernels.launch import Shape

pytest.importorskip("triton")

from halfweight.triton_kernels.aot import compile_launch, instructions_per_weight
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import Metering, guarded, meter

TARGET = "sm_90"


def problem(
    m: int,
    n: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float16,
    parts: tuple[int, ...] | None = None,
    norms: bool = False,
    rank: int = 0,
    scale: float = 1.0,
    seed: int = 0,
    topk: bool = False,
) -> tuple[Tensor, Tensor, InputSelection]:
    """`(x, Wt, selection)`; part p selects about a third to two thirds of the inputs, `topk`: of every token's."""
    generator = torch.Generator().manual_seed(seed)
    count = len(parts or (n,))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    thresholds = scale * torch.linspace(0.5, 0.9, count)
    return (
        (scale * normal(m, k)).to(dtype),
        (normal(k, n) / k**0.5).to(dtype),
        InputSelection(
            None if topk else to_bits(thresholds),
            to_bits(normal(count, k).abs() + 0.5) if norms else None,
            (normal(count, k, rank) / k**0.5).to(dtype) if rank else None,
            normal(n, rank).to(dtype) if rank else None,
            (k * torch.linspace(0.34, 0.66, count)).ceil().int() if topk else None,
        ),
    )


def run(
    x: Tensor, prepared: layout.Prepared, bias: Tensor | None = None, *, metered: bool = False
) -> tuple[Tensor, list[Metering]]:
    """y (fp32, poisoned with NaN beforehand) of the launches that `plan` makes, and their metering."""
    y = guarded(torch.full((x.shape[0], prepared.n), float("nan")))
    prepared = prepared._replace(
        **{key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    )
    prepared.workspace.fill_(float("nan"))
    functions = {kernel.name.partition(".")[2]: kernel.jit() for kernel in KERNELS}
    meters: list[Metering] = []
    dot_dtype = torch.float32 if x.dtype == torch.bfloat16 else None
    for name, launch in plan.plan(guarded(x), prepared, y, None if bias is None else guarded(bias), TARGET, dot_dtype):
        if metered:
            meters.append(meter(functions[name], launch))
        else:
            interpret(functions[name], launch)
    return y, meters


def error(y: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - expected).norm() / expected.norm())


def expect(x: Tensor, weight: Tensor, selection: InputSelection, bias: Tensor | None = None, **options) -> Tensor:
    return reference.linear(x.double(), weight, selection, bias, **options)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 63])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_number_of_tokens(m: int, dtype: torch.dtype) -> None:
    x, weight, selection = problem(m, 72, 333, dtype=dtype)
    y, _ = run(x, layout.prepare(weight, selection))
    assert error(y, expect(x, weight, selection)) < 1e-5


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (32, 32), (33, 31), (96, 128), (40, 576), (64, 1536), (31, 2047), (512, 1024), (1056, 130)]
)
@pytest.mark.parametrize("m", [1, 5])
def test_odd_shapes(m: int, n: int, k: int) -> None:
    x, weight, selection = problem(m, n, k, scale=4.0)
    x[:, 0] = 8.0  # something is selected
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    y, _ = run(x, layout.prepare(weight, selection), bias)
    assert error(y, expect(x, weight, selection, bias)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("parts", "rank"), [(None, 5), (None, 64), ((40, 8, 72), 0), ((64, 20, 36), 17)])
@pytest.mark.parametrize("m", [1, 3, 17])
def test_parts_norms_and_branch(
    m: int, parts: tuple[int, ...] | None, rank: int, norms: bool, dtype: torch.dtype
) -> None:
    n, k = 120, 1100
    x, weight, selection = problem(m, n, k, parts=parts, norms=norms, rank=rank, dtype=dtype)
    bias = torch.ones(n, dtype=dtype)
    y, _ = run(x, layout.prepare(weight, selection, parts=parts), bias)
    # z is the sum of two 16-bit numbers in `dot`.
    assert error(y, expect(x, weight, selection, bias, parts=parts)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("parts", "rank"), [(None, 0), ((40, 8, 72), 0), ((64, 20, 36), 17)])
@pytest.mark.parametrize("m", [1, 3, 17])
def test_every_token_reads_its_count(m: int, parts: tuple[int, ...] | None, rank: int, dtype: torch.dtype) -> None:
    x, weight, selection = problem(m, 120, 1100, parts=parts, norms=rank > 0, rank=rank, dtype=dtype, topk=True)
    x *= torch.logspace(-2, 2, m)[:, None]  # no threshold would do for all
    y, _ = run(x, layout.prepare(weight, selection, parts=parts))
    want = expect(x, weight, selection, parts=parts)
    assert max(error(a, b) for a, b in zip(y, want, strict=True)) < 1e-5


@pytest.mark.parametrize("k", [1, 31, 128, 1000, 2048])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuts_are_those_of_the_reference(dtype: torch.dtype, norms: bool, k: int) -> None:
    parts = (7, 9)
    x, weight, selection = problem(5, 16, k, parts=parts, norms=norms, dtype=dtype, topk=True)
    x[1] = 0
    x[2] = 3.0
    x[3, 0] = float("nan")
    x[4, : k // 4] = float("inf")
    ((_, launch),), prepared = plan.with_cuts(guarded(x), layout.prepare(weight, selection, parts=parts), TARGET)
    interpret(KERNELS[5].jit(), launch)
    for part in range(2):
        score = x.float().abs() * (selection.norms.view(torch.float32)[part] if norms else 1)
        count = int(selection.counts[part])
        assert torch.equal(prepared.thresholds[:, part, None], reference.token_cuts(score, count))
        assert torch.equal(
            reference.selected(x, selection, part), reference.selected(x, selection, part, prepared.thresholds)
        )


@pytest.mark.parametrize("m", [1, 40])
def test_bytes_of_the_cuts(m: int) -> None:
    shape, kernel = Shape(m, 64, 1024), KERNELS[5]
    metering = meter(kernel.jit(), kernel.sample(shape, torch.float16, TARGET))
    counted = sum(traffic.requested for traffic in metering.arguments.values())
    assert counted == m * 1024 * 2 + 4 * m + 4 * m  # a token's program reads the count again
    assert kernel.bytes(shape, torch.float16) == counted - 4 * (m - 1)


def test_large_activations_stay_exact() -> None:
    x, weight, selection = problem(2, 64, 256, dtype=torch.bfloat16, scale=1e4)
    x[0, 3] = 3e4
    y, _ = run(x, layout.prepare(weight, selection))
    assert error(y, expect(x, weight, selection)) < 1e-5


def test_branch_stays_exact_in_fp16_tensor_cores() -> None:
    """The high and low half of z are both used."""
    x, weight, selection = problem(4, 64, 256, rank=8)
    selection = selection._replace(thresholds=to_bits(torch.tensor([100.0])))  # everything goes through the branch
    y, _ = run(x, layout.prepare(weight, selection))
    assert error(y, expect(x, weight, selection)) < 1e-5


@pytest.mark.parametrize("m", [1, 4])
def test_nothing_selected_and_everything_selected(m: int) -> None:
    x, weight, selection = problem(m, 48, 96)
    bias = torch.arange(48.0).half()
    nothing = selection._replace(thresholds=to_bits(torch.tensor([1e6])))
    y, meters = run(x, layout.prepare(weight, nothing), bias, metered=True)
    assert torch.equal(y, bias.float().expand(m, -1))
    assert meters[-1].arguments["weight"].requested == 0
    everything = selection._replace(thresholds=to_bits(torch.tensor([0.0])))
    y, _ = run(x, layout.prepare(weight, everything), bias)
    assert error(y, x.double() @ weight.double() + bias) < 1e-5


@pytest.mark.parametrize("m", [2, 40])
def test_tokens_do_not_touch_each_other(m: int) -> None:
    x, weight, selection = problem(m, 64, 320, rank=8, norms=True)
    prepared = layout.prepare(weight, selection)
    before, _ = run(x, prepared)
    x[1] = float("nan")
    after, _ = run(x, prepared)
    others = [token for token in range(m) if token != 1]
    assert torch.equal(before[others], after[others])
    assert after[1].isnan().all()
    x[1] = float("inf")
    assert torch.equal(before[others], run(x, prepared)[0][others])


@pytest.mark.parametrize("active", [0.4, 0.5])
@pytest.mark.parametrize("m", [1, 2, 8])
def test_skipped_rows_move_no_bytes(m: int, active: float) -> None:
    n, k = 128, 1024
    x, weight, selection = problem(m, n, k)
    threshold = x[0].float().abs().quantile(1 - active)
    selection = selection._replace(thresholds=to_bits(threshold[None]))
    y, meters = run(x, layout.prepare(weight, selection), metered=True)
    used = reference.selected(x, selection, 0).any(0)
    traffic = meters[0].arguments
    assert traffic["weight"].dram_bytes == int(used.sum()) * n * 2 == traffic["weight"].requested
    assert traffic["x"].dram_bytes == m * k * 2
    if m == 1:
        assert traffic["weight"].dram_bytes == pytest.approx(active * n * k * 2, rel=0.01)
    assert meters[0].atomics == 0
    assert error(y, expect(x, weight, selection)) < 1e-5


@pytest.mark.parametrize("m", [1, 3])
def test_branch_reads_only_what_the_weight_does_not(m: int) -> None:
    n, k, rank = 64, 1024, 32
    x, weight, selection = problem(m, n, k, rank=rank)
    _, (rest, main, *_) = run(x, layout.prepare(weight, selection), metered=True)
    used = reference.selected(x, selection, 0)
    assert rest.arguments["weight"].dram_bytes == int((~used).any(0).sum()) * rank * 2
    assert main.arguments["weight"].dram_bytes == (int(used.any(0).sum()) + rank) * n * 2


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 256), (1, 128, 2048), (8, 128, 512), (40, 64, 512)])
@pytest.mark.parametrize("kernel", KERNELS[:4], ids=lambda kernel: kernel.name)
def test_bytes_follow_the_formula(kernel, m: int, n: int, k: int) -> None:
    if not kernel.m_range[0] <= m <= kernel.m_range[1]:
        pytest.skip("another kernel's tokens")
    shape, dtype = Shape(m, n, k), torch.float16
    launch = kernel.sample(shape, dtype, TARGET)
    tensors = {name: guarded(value) for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    metering = meter(kernel.jit(), replace(launch, arguments={**launch.arguments, **tensors}))
    counted = {"x", "weight", "out"}
    sectors = sum(traffic.dram_bytes for name, traffic in metering.arguments.items() if name in counted)
    assert sectors + 4 == kernel.bytes(shape, dtype)
    assert kernel.bytes(shape, dtype) <= 1.03 * kernel.minimum_bytes(shape, dtype)
    assert metering.arguments["weight"].requested == kernel.weight_bytes(shape, dtype)
    assert metering.imbalance <= 1.1


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(0, 35),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (2,)]),
)
def test_layout_round_trip(k: int, parts: list[int], rank: int, norms: bool, topk: bool, lead: tuple[int, ...]) -> None:
    _, weight, selection = problem(1, sum(parts), k, parts=tuple(parts), norms=norms, rank=rank, topk=topk)
    weight = weight.expand(*lead, *weight.shape)
    selection = InputSelection(*(None if t is None else t.expand(*lead, *t.shape) for t in selection))
    prepared = layout.prepare(weight, selection, parts=parts)
    again, selection_again = layout.restore(prepared)
    assert torch.equal(weight, again)
    for before, after in zip(selection, selection_again, strict=True):
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after)
    if lead:
        assert torch.equal(layout.restore(prepared.expert(1))[0], weight[1])


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens_go_through_a_matmul(masked: bool, rank: int, topk: bool) -> None:
    parts = (40, 33)
    x, weight, selection = problem(70, 73, 50, dtype=torch.float32, parts=parts, norms=True, rank=rank, topk=topk)
    bias = torch.ones(73)
    prepared = layout.prepare(weight, selection, parts=parts)
    assert plan.choose(len(x)) == "matmul"
    y = op.matmul(x, prepared, bias, masked=masked)
    assert error(y, expect(x, weight, selection, bias, parts=parts, masked=masked)) < 1e-6
    if not masked:
        assert error(y, x.double() @ weight.double() + 1) < 1e-6


def test_reference_is_the_definition() -> None:
    x, weight, selection = problem(2, 5, 7, dtype=torch.float64, parts=(2, 3), norms=True, rank=2)
    y = reference.linear(x, weight, selection, parts=(2, 3))
    thresholds, norms = selection.thresholds.view(torch.float32), selection.norms.view(torch.float32)
    for m in range(2):
        for n in range(5):
            part = int(n >= 2)
            total = 0.0
            for k in range(7):
                if abs(float(x[m, k])) * float(norms[part, k]) > float(thresholds[part]):
                    total += float(x[m, k] * weight[k, n])
                else:
                    total += float(x[m, k] * (selection.V[part, k] @ selection.U[n]))
            assert float(y[m, n]) == pytest.approx(total, rel=1e-5, abs=1e-9)


def test_heuristics_cover_every_input_and_fit_the_workspace() -> None:
    for m in range(1, 64):
        for n, k in ((1, 1), (576, 576), (1024, 4096), (4096, 4096), (6144, 4096), (4096, 14336), (28672, 8192)):
            chosen = split.split(m, -(-n // split.TILE), k)
            assert (chosen.slices - 1) * chosen.slice_k < k <= chosen.slices * chosen.slice_k
            assert sum(split.partial_sizes(m, n, k, 64, 1)) <= split.workspace_size(n, k, 64, 1)


def test_operator_has_a_fake() -> None:
    op.register()
    op.register()
    prepared = op.example_prepared(Shape(1, 48, 64), torch.float16, rank=4)
    x = torch.empty((2, 3, 64), dtype=torch.float16, device="meta")
    y = torch.ops.halfweight.input_select_gpu(x, *prepared[:-1], list(prepared.parts), None, True)
    assert y.shape == (2, 3, 48) and y.dtype == torch.float16


def test_can_run_says_why_not() -> None:
    assert plan.can_run((64, 64), torch.bfloat16, "sm_80") == (True, "")
    assert "fp16 or bf16" in plan.can_run((64, 64), torch.float32, "sm_80")[1]
    assert "sm_70" in plan.can_run((64, 64), torch.float16, "sm_70")[1]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [576, 28672])
def test_machine_code_of_the_cuts(k: int, dtype: torch.dtype, target: str) -> None:
    kernel = KERNELS[5]
    assert compile_launch(kernel.jit(), kernel.example(Shape(1, 64, k), dtype, target), target).spills == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "m"), [("gemv", 1), ("dot", 8), ("dot", 63)])
def test_machine_code(name: str, m: int, dtype: torch.dtype, target: str) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == f"input_select.{name}")
    shape = Shape(m, 4096, 4096)
    launch = kernel.example(shape, dtype, target)
    binary = compile_launch(kernel.jit(), launch, target)
    assert binary.spills == 0
    if target.startswith("gfx"):
        return
    assert {load.opcode for load in binary.sass.instructions if load.is_weight_load} == {"LDG.E.EF.128"}
    if name == "gemv":
        assert not {i.opcode.split(".")[0] for i in binary.sass.main_loop} & {"LDS", "STS", "SHFL", "BAR"}
        measured = instructions_per_weight(launch, binary, kernel.weights(shape), kernel.weight_bytes(shape, dtype))
        assert measured <= kernel.budget[dtype]
