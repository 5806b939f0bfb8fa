"""Input-selected int4 linears, dense and group-sparse: interpreted kernels against an fp64 reference, bytes, code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import groups, integers
from halfweight.triton_kernels.formats.bits import to_bits
from halfweight.triton_kernels.formats.groups import Groups
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.formats.integers import Integers
from halfweight.triton_kernels.input_select import op as select_op
from halfweight.triton_kernels.input_select import reference as select_reference
from halfweight.triton_kernels.input_select_int4 import layout, op, plan, reference
from halfweight.triton_kernels.input_select_int4.op import KERNELS
from halfweight.triton_kernels.launch import Kernel, Shape

pytest.importorskip("triton")

from halfweight.triton_kernels.aot import compile_launch, instructions_per_weight
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import Metering, guarded, meter

TARGET = "sm_90"
BY_NAME = {kernel.name: kernel for kernel in (*KERNELS, *select_op.KERNELS)}
Packed = list[Integers] | list[Groups]


def weights(
    k: int, widths: tuple[int, ...], group_size: int, *, kept: float | None, symmetric: bool, segments: int = 1
) -> Packed:
    """Random W^T `[k, width]` of each part; `kept`: share of groups, or None for dense integers."""
    generator = torch.Generator().manual_seed(1)

    def codes(*shape: int) -> Tensor:
        return torch.randint(16, shape, generator=generator, dtype=torch.uint8)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) / k**0.5).half()

    packed: list = []
    for width in widths:
        total = -(-width // group_size)
        if kept is None:
            zeros = None if symmetric else codes(k, total)
            quantized = integers.Quantized(codes(k, width), scales(k, total), zeros)
            packed.append(integers.pack(quantized, bits=4, group_size=group_size))
            continue
        count = int(total / segments * kept) * segments
        order = torch.rand((k, segments, total // segments), generator=generator).argsort(-1)
        start = torch.arange(segments)[:, None] * (total // segments)
        numbers = (order[..., : count // segments].sort(-1).values + start).flatten(-2)
        zeros = None if symmetric else codes(k, count)
        entries = groups.KeptGroups(codes(k, count, group_size), scales(k, count), zeros, numbers)
        packed.append(groups.pack(entries, width, segments=segments))
    return packed


def selection_of(
    k: int,
    widths: tuple[int, ...],
    *,
    norms: bool = False,
    rank: int = 0,
    dtype: torch.dtype = torch.float16,
    topk: bool = False,
) -> InputSelection:
    """Part p selects about a third to two thirds of normal inputs."""
    generator = torch.Generator().manual_seed(2)
    count, n = len(widths), sum(widths)
    return InputSelection(
        None if topk else to_bits(torch.linspace(0.5, 0.9, count)),
        to_bits(torch.randn((count, k), generator=generator).abs() + 0.5) if norms else None,
        (torch.randn((count, k, rank), generator=generator) / k**0.5).to(dtype) if rank else None,
        torch.randn((n, rank), generator=generator).to(dtype) if rank else None,
        (k * torch.linspace(0.34, 0.66, count)).ceil().int() if topk else None,
    )


def inputs(m: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn((m, k), generator=torch.Generator().manual_seed(3)).to(dtype)


def guarded_all(prepared: layout.Prepared) -> layout.Prepared:
    """With red zones around every tensor, and a workspace full of NaN."""

    def guard(values):  # type: ignore[no-untyped-def]
        return values._replace(
            **{name: guarded(value) for name, value in values._asdict().items() if isinstance(value, Tensor)}
        )

    select = guard(prepared.select)
    select.workspace.fill_(float("nan"))
    return guard(prepared)._replace(select=select)


def run(
    x: Tensor,
    prepared: layout.Prepared,
    bias: Tensor | None = None,
    *,
    metered: bool = False,
    dot_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Metering]]:
    """y (fp32, poisoned with NaN beforehand) of the launches that `plan` makes, and their metering.

    Products in fp32 by default: on a GPU, weights are rounded to x's type first, as in a dense matmul.
    """
    y = guarded(torch.full((x.shape[0], prepared.select.n), float("nan")))
    meters: dict[str, Metering] = {}
    bias = None if bias is None else guarded(bias)
    for name, launch in plan.plan(guarded(x), guarded_all(prepared), y, bias, TARGET, dot_dtype):
        if metered:
            meters[name] = meter(BY_NAME[name].jit(), launch)
        else:
            interpret(BY_NAME[name].jit(), launch)
    return y, meters


def error(y: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 63])
@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_number_of_tokens(m: int, kept: float | None, dtype: torch.dtype) -> None:
    k, widths = 300, (200,)
    packed = weights(k, widths, 32, kept=kept, symmetric=False)
    selection, x = selection_of(k, widths), inputs(m, k, dtype)
    y, _ = run(x, layout.prepare(packed, selection, widths, group_size=32))
    assert error(y, reference.linear(x.double(), packed, selection, widths, group_size=32)) < 1e-5


@pytest.mark.parametrize(("widths", "rank"), [((200,), 0), ((120, 40, 40), 7)])
@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_every_token_reads_its_count(m: int, kept: float | None, widths: tuple[int, ...], rank: int) -> None:
    packed = weights(300, widths, 8, kept=kept, symmetric=False)
    selection = selection_of(300, widths, norms=rank > 0, rank=rank, topk=True)
    x = inputs(m, 300) * torch.logspace(-1, 1, m)[:, None].half()  # no threshold would do for all
    prepared = layout.prepare(packed, selection, widths, group_size=8)
    want = reference.linear(x.double(), packed, selection, widths, group_size=8)
    if plan.choose(m) == "matmul":
        _, again = layout.restore(prepared, symmetric=False)
        y = reference.linear(x.double(), packed, again, widths, group_size=8)
    else:
        y, _ = run(x, prepared)
    assert max(error(a, b) for a, b in zip(y, want, strict=True)) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("group_size", "kept"),
    [(8, None), (16, None), (64, None), (128, None), (256, None), (500, None), (8, 0.5), (16, 0.5), (16, 0.9),
     (32, 0.3), (64, 0.5), (16, 1.0), (16, 0.0)],
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 3])
def test_group_sizes(m: int, group_size: int, kept: float | None, symmetric: bool) -> None:
    k, widths = 130, (360,)
    packed = weights(k, widths, group_size, kept=kept, symmetric=symmetric)
    selection, x = selection_of(k, widths), inputs(m, k)
    bias = torch.randn(360, generator=torch.Generator().manual_seed(5)).half()
    y, _ = run(x, layout.prepare(packed, selection, widths, group_size=group_size), bias)
    assert error(y, reference.linear(x.double(), packed, selection, widths, bias, group_size=group_size)) < 1e-5


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (16, 33), (130, 576), (1030, 100), (32, 2100)])
@pytest.mark.parametrize("m", [1, 2])
def test_odd_shapes(m: int, n: int, k: int, kept: float | None) -> None:
    packed = weights(k, (n,), 16, kept=kept, symmetric=False)
    selection, x = selection_of(k, (n,)), inputs(m, k)
    x[:, 0] = 4.0  # something is selected
    bias = torch.ones(n, dtype=torch.float16)
    y, _ = run(x, layout.prepare(packed, selection, (n,), group_size=16), bias)
    assert error(y, reference.linear(x.double(), packed, selection, (n,), bias, group_size=16)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize(
    ("widths", "norms", "rank"), [((40, 136, 24), True, 9), ((100,), False, 40), ((64, 64), True, 0)]
)
@pytest.mark.parametrize("m", [1, 5])
def test_parts_norms_and_branch(
    m: int, widths: tuple[int, ...], norms: bool, rank: int, kept: float | None, dtype: torch.dtype
) -> None:
    k = 530
    packed = weights(k, widths, 16, kept=kept, symmetric=False)
    selection, x = selection_of(k, widths, norms=norms, rank=rank, dtype=dtype), inputs(m, k, dtype)
    bias = torch.ones(sum(widths), dtype=dtype)
    y, _ = run(x, layout.prepare(packed, selection, widths, group_size=16), bias)
    assert error(y, reference.linear(x.double(), packed, selection, widths, bias, group_size=16)) < 1e-5


@pytest.mark.parametrize("kept", [None, 0.5])
def test_products_in_fp16(kept: float | None) -> None:
    """As on a GPU: weights are rounded once to fp16."""
    packed = weights(400, (96,), 32, kept=kept, symmetric=False)
    selection, x = selection_of(400, (96,)), inputs(8, 400)
    y, _ = run(x, layout.prepare(packed, selection, (96,), group_size=32), dot_dtype=torch.float16)
    expected = reference.linear(x.double(), packed, selection, (96,), group_size=32)
    assert error(y, expected) < 1e-3


@pytest.mark.parametrize("m", [1, 2])
def test_large_activations_stay_exact(m: int) -> None:
    packed = weights(256, (64,), 32, kept=None, symmetric=True)
    selection, x = selection_of(256, (64,)), inputs(m, 256, torch.bfloat16) * 1e4
    x[0, 3] = 3e4
    y, _ = run(x, layout.prepare(packed, selection, (64,), group_size=32))
    assert error(y, reference.linear(x.double(), packed, selection, (64,), group_size=32)) < 1e-5


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("m", [2, 40])
def test_tokens_do_not_touch_each_other(m: int, kept: float | None) -> None:
    packed = weights(320, (64,), 16, kept=kept, symmetric=False)
    selection, x = selection_of(320, (64,), rank=8, norms=True), inputs(m, 320)
    prepared = layout.prepare(packed, selection, (64,), group_size=16)
    before, _ = run(x, prepared)
    x[1] = float("nan")
    after, _ = run(x, prepared)
    others = [token for token in range(m) if token != 1]
    assert error(after[others], before[others].double()) < 1e-6  # the lists are longer, so sums are rounded elsewhere
    assert after[1].isnan().all()


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("m", [1, 4])
def test_nothing_selected_and_everything_selected(m: int, kept: float | None) -> None:
    packed = weights(96, (48,), 16, kept=kept, symmetric=True)
    selection, x = selection_of(96, (48,)), inputs(m, 96)
    bias = torch.arange(48.0).half()
    nothing = selection._replace(thresholds=to_bits(torch.tensor([1e6])))
    y, meters = run(x, layout.prepare(packed, nothing, (48,), group_size=16), bias, metered=True)
    assert torch.equal(y, bias.float().expand(m, -1))
    assert all(metering.arguments["codes"].requested == 0 for name, metering in meters.items() if "int4.g" in name)
    everything = selection._replace(thresholds=to_bits(torch.tensor([0.0])))
    y, _ = run(x, layout.prepare(packed, everything, (48,), group_size=16), bias)
    assert error(y, reference.linear(x.double(), packed, everything, (48,), bias, group_size=16, masked=False)) < 1e-5


@pytest.mark.parametrize("active", [0.4, 0.5])
@pytest.mark.parametrize(("group_size", "kept"), [(128, None), (32, None), (16, 0.5)])
@pytest.mark.parametrize("m", [1, 2])
def test_skipped_rows_move_no_bytes(m: int, group_size: int, kept: float | None, active: float) -> None:
    n, k = 256, 1024
    packed = weights(k, (n,), group_size, kept=kept, symmetric=kept is None)
    x = inputs(m, k)
    threshold = x[0].float().abs().quantile(1 - active)
    selection = selection_of(k, (n,))._replace(thresholds=to_bits(threshold[None]))
    prepared = layout.prepare(packed, selection, (n,), group_size=group_size)
    _, meters = run(x, prepared, metered=True)
    used = int(select_reference.selected(x, selection, 0).any(0).sum())
    kind = ("" if kept is None else "group_") + ("gemv" if m == 1 else "dot")
    traffic = meters[f"input_select_int4.{kind}"].arguments
    row_bytes = prepared.kept * prepared.group_size // 2
    assert traffic["codes"].requested == traffic["codes"].dram_bytes == used * row_bytes
    if m == 1:
        assert used * row_bytes == pytest.approx(active * k * n * (kept or 1) / 2, rel=0.01)
    assert all(metering.atomics == 0 for metering in meters.values())


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 512, 256), (1, 256, 1024), (8, 256, 256), (40, 256, 256), (64, 512, 256)]
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_bytes_follow_the_formula(kernel, m: int, n: int, k: int) -> None:
    if not kernel.m_range[0] <= m <= kernel.m_range[1]:
        pytest.skip("another kernel's tokens")
    shape, dtype = Shape(m, n, k), torch.float16
    launch = kernel.sample(shape, dtype, TARGET)
    metering = meter(kernel.jit(), launch)
    assert metering.dram_bytes == kernel.bytes(shape, dtype)
    # Beside its codes a kept group of 32 takes 4.5 bytes here (scale, zero, half an entry word) and 4 in the file.
    assert kernel.bytes(shape, dtype) <= 1.03 * kernel.minimum_bytes(shape, dtype)
    if kernel.weights(shape):
        assert metering.arguments["codes"].requested == kernel.weight_bytes(shape, dtype)
        assert metering.imbalance <= 1.1


sizes = st.sampled_from([8, 16, 32, 64])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 200), min_size=1, max_size=3), sizes, st.floats(0, 1), st.booleans())
def test_kept_groups_round_trip(k: int, widths: list[int], group_size: int, kept: float, symmetric: bool) -> None:
    packed = weights(k, tuple(widths), group_size, kept=kept, symmetric=symmetric)
    selection = selection_of(k, tuple(widths), rank=3)
    prepared = layout.prepare(packed, selection, widths, group_size=group_size)
    same(packed, selection, *layout.restore(prepared, symmetric=symmetric))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 300), min_size=1, max_size=3),
    st.sampled_from([8, 16, 32, 64, 128, 256, 300]),
    st.booleans(),
)
def test_dense_round_trip(k: int, widths: list[int], group_size: int, symmetric: bool) -> None:
    packed = weights(k, tuple(widths), group_size, kept=None, symmetric=symmetric)
    selection = selection_of(k, tuple(widths), norms=True)
    prepared = layout.prepare(packed, selection, widths, group_size=group_size)
    same(packed, selection, *layout.restore(prepared, symmetric=symmetric))


def same(packed: Packed, selection: InputSelection, packed_again: Packed, selection_again: InputSelection) -> None:
    for before, after in zip((*packed, selection), (*packed_again, selection_again), strict=True):
        for a, b in zip(before, after, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_segments_and_experts() -> None:
    widths = (256,)
    packed = weights(12, widths, 16, kept=0.5, symmetric=False, segments=4)
    selection = selection_of(12, widths)
    stack = [Groups(*(tensor.expand(3, *tensor.shape) for tensor in packed[0]))]
    both = InputSelection(selection.thresholds.expand(3, -1))
    prepared = layout.prepare(stack, both, widths, group_size=16, segments=4)
    same(stack, both, *layout.restore(prepared, symmetric=False))
    same(packed, selection, *layout.restore(prepared.expert(2), symmetric=False))
    x = inputs(1, 12)
    y, _ = run(x, prepared.expert(1))
    expected = reference.linear(x.double(), packed, selection, widths, group_size=16, segments=4)
    assert error(y, expected) < 1e-5


@pytest.mark.parametrize("group_size", [8, 16, 32, 64])
@pytest.mark.parametrize("kept", [None, 0.5])
def test_expanding_is_exact_in_fp32(kept: float | None, group_size: int) -> None:
    widths = (140, 33)
    packed = weights(50, widths, group_size, kept=kept, symmetric=False)
    prepared = guarded_all(layout.prepare(packed, selection_of(50, widths), widths, group_size=group_size))
    weight = guarded(torch.full((50, 173), float("nan")))
    interpret(BY_NAME["input_select_int4.expand"].jit(), plan.plan_expand(prepared, weight, TARGET))
    expected = reference.dense(packed, widths, group_size=group_size, segments=1, dtype=torch.float32)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens_go_through_a_matmul(masked: bool, kept: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "run", lambda kernel, launch: interpret(kernel.jit(), launch))
    monkeypatch.setattr(op, "device_target", lambda device: TARGET)
    widths = (40, 33)
    packed = weights(50, widths, 8, kept=kept, symmetric=False)
    selection = selection_of(50, widths, norms=True, rank=6, dtype=torch.float32)
    x, bias = inputs(70, 50, torch.float32), torch.ones(73)
    assert plan.choose(len(x)) == "matmul"
    prepared, scratch = layout.prepare(packed, selection, widths, group_size=8), torch.full((9000,), float("nan"))
    y = op.linear(x, prepared, bias, masked=masked, scratch=scratch)
    assert scratch[: op.scratch_numbers(prepared)].isfinite().all()
    expected = reference.linear(x.double(), packed, selection, widths, bias, group_size=8, masked=masked)
    assert error(y, expected) < 1e-6


def test_unsupported_groups_are_refused() -> None:
    packed = weights(4, (256,), 96, kept=None, symmetric=True)
    with pytest.raises(ValueError, match="96 columns"):
        layout.prepare(packed, selection_of(4, (256,)), (256,), group_size=96)
    assert plan.can_run((64, 64), torch.bfloat16, "sm_80") == (True, "")
    assert "fp16 or bf16" in plan.can_run((64, 64), torch.float32, "sm_80")[1]
    assert "sm_70" in plan.can_run((64, 64), torch.float16, "sm_70")[1]


def test_operator_has_a_fake() -> None:
    op.register()
    op.register()
    prepared = op.example_prepared(Shape(1, 48, 64), torch.float16, sparse=True)
    tensors, select = prepared[:5], prepared.select
    x = torch.empty((2, 3, 64), dtype=torch.float16, device="meta")
    y = torch.ops.halfweight.input_select_int4_gpu(
        x, *tensors, *prepared[6:], *select[:-1], list(select.parts), None, True
    )
    assert y.shape == (2, 3, 48) and y.dtype == torch.float16


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS[1:], ids=lambda kernel: kernel.name)
def test_machine_code(kernel, dtype: torch.dtype, target: str) -> None:
    shape = Shape(max(min(8, kernel.m_range[1]), kernel.m_range[0]), 4096, 4096)
    launch = kernel.example(shape, dtype, target)
    binary = compile_launch(kernel.jit(), launch, target)
    assert binary.spills == 0
    if target.startswith("gfx"):
        return
    if kernel.name.endswith("expand"):
        assert {i.opcode for i in binary.sass.instructions if i.opcode.startswith("STG")} == {"STG.E.128"}
    assert {load.opcode for load in binary.sass.instructions if load.is_weight_load} == {"LDG.E.EF.128"}
    if kernel.loop_is_clean:
        assert not {i.opcode.split(".")[0] for i in binary.sass.main_loop} & {"LDS", "STS", "SHFL", "BAR"}
        measured = instructions_per_weight(launch, binary, kernel.weights(shape), kernel.weight_bytes(shape, dtype))
        assert measured <= kernel.budget[dtype]
