"""2:4 linears on GPUs: interpreted kernels against an fp64 reference, bytes metered, machine code read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import two_four
from halfweight.triton_kernels.launch import NVIDIA, Kernel, Shape
from halfweight.triton_kernels.two_four import layout, op, plan, reference

pytest.importorskip("triton")

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

TARGET = "sm_90"
DTYPES = (torch.float16, torch.bfloat16)
KERNELS = {kernel.name.partition(".")[2]: kernel for kernel in op.KERNELS}
LINEARS = ("select", "mma_sp", "dot")
TOKENS = {"select": range(1, 9), "mma_sp": (*range(1, 10), 16, 33, 63), "dot": (9, 16, 33, 63)}


def problem(
    m: int, n: int, k: int, dtype: torch.dtype = torch.float16, lead: tuple[int, ...] = (), scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`(x, values, meta)`; some groups keep fewer than two weights."""
    generator = torch.Generator().manual_seed(m + n + k)
    dense = torch.randn(*lead, n, k // 4, 4, generator=generator)
    kept = torch.rand(dense.shape, generator=generator).argsort(-1) < 2
    kept &= torch.rand(dense.shape, generator=generator) < 0.9
    x = scale * torch.randn(m, k, generator=generator)
    return (x.to(dtype), *two_four.pack((dense * kept).flatten(-2).to(dtype)))


def run(name: str, x: Tensor, prepared: layout.Prepared, bias: Tensor | None = None) -> Tensor:
    """y (fp32, poisoned with NaN beforehand) of one interpreted launch; every tensor between red zones."""
    y = guarded(torch.full((x.shape[0], prepared.n), float("nan")))
    prepared = prepared._replace(fragments=guarded(prepared.fragments), metadata=guarded(prepared.metadata))
    # Triton's interpreter cannot multiply bf16.
    options = {"dot_dtype": torch.float32} if name == "dot" and x.dtype == torch.bfloat16 else {}
    launch = op.PLANS[name](guarded(x), prepared, y, None if bias is None else guarded(bias), TARGET, **options)
    interpret(KERNELS[name].jit(), launch)
    return y


def error(y: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "m"), [(name, m) for name in LINEARS for m in TOKENS[name]])
def test_any_number_of_tokens(name: str, m: int, dtype: torch.dtype) -> None:
    x, values, meta = problem(m, 40, 548, dtype)
    y = run(name, x, layout.prepare(values, meta))
    assert error(y, reference.linear(x.double(), values, meta)) < 1e-5


@pytest.mark.parametrize(
    ("n", "k"), [(1, 4), (16, 32), (17, 28), (33, 256), (8, 516), (48, 1280), (5, 2044), (64, 2048)]
)
@pytest.mark.parametrize(("name", "m"), [("select", 1), ("mma_sp", 1), ("mma_sp", 20), ("dot", 9)])
def test_odd_shapes_with_bias(name: str, m: int, n: int, k: int) -> None:
    x, values, meta = problem(m, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    y = run(name, x, layout.prepare(values, meta), bias)
    assert error(y, reference.linear(x.double(), values, meta, bias)) < 1e-5


@pytest.mark.parametrize("name", LINEARS)
def test_large_bfloat16_activations(name: str) -> None:
    x, values, meta = problem(3, 32, 256, torch.bfloat16, scale=1e4)
    x[0, :8] = 3e4
    y = run(name, x, layout.prepare(values, meta))
    assert error(y, reference.linear(x.double(), values, meta)) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, about the poisoned tokens
@pytest.mark.parametrize("name", LINEARS)
def test_tokens_do_not_see_each_other(name: str) -> None:
    x, values, meta = problem(5, 32, 300)
    prepared = layout.prepare(values, meta)
    clean = run(name, x, prepared)
    x[1], x[3, 7] = float("nan"), float("inf")
    others = [0, 2, 4]
    assert torch.equal(run(name, x, prepared)[others], clean[others])


@pytest.mark.parametrize("name", LINEARS)
def test_one_expert_of_a_stack(name: str) -> None:
    x, values, meta = problem(2, 20, 64, lead=(3,))
    prepared = layout.prepare(values, meta)
    for expert in range(3):
        expected = reference.linear(x.double(), values[expert], meta[expert])
        assert error(run(name, x, prepared.expert(expert)), expected) < 1e-5


@given(
    st.sampled_from([(), (1,), (2, 3)]),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_layout_round_trip(lead: tuple[int, ...], n: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    _, values, meta = problem(1, n, 4 * groups, dtype, lead)
    prepared = layout.prepare(values, meta)
    shapes = layout.prepared_shapes(n, 4 * groups)
    assert {key: getattr(prepared, key).shape[len(lead) :] for key in shapes} == shapes
    restored_values, restored_meta = layout.restore(prepared)
    assert torch.equal(restored_values.view(torch.int16), values.view(torch.int16))
    assert torch.equal(restored_meta, meta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (17, 36), (40, 548), (32, 2048)])
def test_expanded_weight_is_exact(n: int, k: int, dtype: torch.dtype) -> None:
    _, values, meta = problem(1, n, k, dtype)
    prepared = layout.prepare(values, meta)
    prepared = prepared._replace(fragments=guarded(prepared.fragments), metadata=guarded(prepared.metadata))
    dense = guarded(torch.full((n, k), float("nan"), dtype=dtype))
    interpret(KERNELS["expand"].jit(), plan.plan_expand(prepared, dense, TARGET))
    assert torch.equal(dense.view(torch.int16), two_four.unpack(values, meta).view(torch.int16))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("select", Shape(1, 64, 2048)),
        ("select", Shape(4, 128, 1024)),
        ("mma_sp", Shape(1, 256, 2048)),
        ("mma_sp", Shape(8, 64, 4096)),
        ("dot", Shape(16, 128, 1024)),
        ("expand", Shape(64, 64, 2048)),
    ],
)
def test_every_byte_is_moved_once(name: str, shape: Shape) -> None:
    kernel = KERNELS[name]
    metering = meter(kernel.jit(), kernel.sample(shape, torch.float16, TARGET))
    assert metering.dram_bytes == kernel.bytes(shape, torch.float16)
    assert metering.dram_bytes <= 1.03 * kernel.minimum_bytes(shape, torch.float16)
    assert metering.imbalance <= 1.1
    assert metering.atomics == 0


def test_the_kernel_fits_the_machine() -> None:
    half = torch.float16
    assert plan.choose(1, 4096, 4096, half, "sm_90") == "mma_sp"
    assert plan.choose(1, 4096, 4096, half, "sm_90", asm=False) == "select"
    assert plan.choose(9, 4096, 4096, half, "sm_90") == "mma_sp"
    assert plan.choose(9, 4096, 4096, half, "sm_90", asm=False) == "dot"
    assert plan.choose(63, 4096, 4096, half, "gfx942") == "dot"
    assert plan.choose(64, 4096, 4096, half, "sm_90") == "expand"
    assert plan.choose(8, 4096, 4096, half, "gfx942") == "select"
    assert plan.can_run((64, 64), half, "sm_80") == (True, "")
    assert not plan.can_run((64, 62), half, "sm_80")[0]
    assert not plan.can_run((64, 64), torch.float32, "sm_80")[0]
    assert not plan.can_run((2**30, 64), half, "sm_80")[0]
    # Warps: about a thousand, when the columns last.
    assert [plan.column_split(n, 4096) for n in (512, 4096, 8192, 16384)] == [8, 4, 2, 1]
    assert plan.column_split(512, 600) == 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "m", "most"), [("select", 1, 9.0), ("select", 8, 36.0), ("mma_sp", 1, 3.0), ("mma_sp", 8, 3.1)]
)
def test_instructions_per_kept_weight(name: str, m: int, most: float, target: str) -> None:
    kernel, shape = KERNELS[name], Shape(m, 4096, 4096)
    for dtype in DTYPES:
        launch = kernel.example(shape, dtype, target)
        binary = aot.compile_launch(kernel.jit(), launch, target)
        assert (
            aot.instructions_per_weight(launch, binary, kernel.weights(shape), kernel.weight_bytes(shape, dtype))
            <= most
        )
        assert binary.spills == 0 and aot.misplaced_fragments(binary.ttgir) == []


@pytest.mark.parametrize("kernel", op.KERNELS, ids=lambda kernel: kernel.name)
def test_assembly_is_for_nvidia_only(kernel: Kernel) -> None:
    assert not kernel.inline_asm or set(kernel.targets) <= set(NVIDIA)
