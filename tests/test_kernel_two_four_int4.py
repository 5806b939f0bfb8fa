"""2:4 int4 linears on GPUs: interpreted kernels against an fp64 reference, bytes metered, machine code read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import two_four_int4
from halfweight.triton_kernels.formats.integers import Quantized
from halfweight.triton_kernels.formats.two_four_int4 import TwoFourInt4
from halfweight.triton_kernels.launch import Shape
from halfweight.triton_kernels.two_four_int4 import layout, op, plan, reference

pytest.importorskip("triton")

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

TARGET = "sm_90"
DTYPES = (torch.float16, torch.bfloat16)
KERNELS = {kernel.name.partition(".")[2]: kernel for kernel in op.KERNELS}
LINEARS = ("select", "mma_sp", "dot")
TOKENS = {"select": range(1, 9), "mma_sp": (*range(1, 10), 16), "dot": (9, 16, 33, 63)}


def problem(
    m: int,
    n: int,
    k: int,
    group_size: int,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    lead: tuple[int, ...] = (),
    scale: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, TwoFourInt4]:
    """`(x, packed)`; some groups of four keep fewer than two weights."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-k // group_size)
    codes = torch.randint(0, 16, (*lead, n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (*lead, n, count), generator=generator, dtype=torch.uint8)
    scales = torch.rand(*lead, n, count, generator=generator).half()
    mask = torch.rand(*lead, n, k // 4, 4, generator=generator).argsort(-1) < 2
    mask &= torch.rand(mask.shape, generator=generator) < 0.9
    quantized = Quantized(codes, scales, None if symmetric else zeros)
    x = scale * torch.randn(m, k, generator=generator)
    return x.to(dtype), two_four_int4.pack(quantized, mask.flatten(-2), group_size=group_size)


def run(name: str, x: Tensor, prepared: layout.Prepared, bias: Tensor | None = None) -> Tensor:
    """y (fp32, poisoned with NaN beforehand) of one interpreted launch; every tensor between red zones."""
    y = guarded(torch.full((x.shape[0], prepared.n), float("nan")))
    tensors = {key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    # Triton's interpreter cannot multiply bf16.
    options = {"dot_dtype": torch.float32} if name == "dot" and x.dtype == torch.bfloat16 else {}
    launch = op.PLANS[name](
        guarded(x), prepared._replace(**tensors), y, None if bias is None else guarded(bias), TARGET, **options
    )
    interpret(KERNELS[name].jit(), launch)
    return y


def check(name: str, x: Tensor, packed: TwoFourInt4, group_size: int, bias: Tensor | None = None) -> None:
    """Relative RMS error against fp64; `dot` multiplies weights rounded to x's type, as a dense matmul would."""
    y = run(name, x, layout.prepare(packed, group_size=group_size, k=x.shape[1]), bias)
    expected = reference.linear(x.double(), packed, bias, group_size=group_size)
    if name == "dot":
        weight = two_four_int4.dequantize(packed, group_size=group_size, columns=x.shape[1], dtype=x.dtype)
        exact, expected = expected, x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert float((y.double() - exact).norm() / exact.norm()) < 3e-3
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "m"), [(name, m) for name in LINEARS for m in TOKENS[name]])
def test_any_number_of_tokens(name: str, m: int, dtype: torch.dtype) -> None:
    x, packed = problem(m, 40, 548, 128, symmetric=m % 2 == 0, dtype=dtype)
    check(name, x, packed, 128)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 4096])
@pytest.mark.parametrize("name", LINEARS)
def test_groups(name: str, group_size: int, symmetric: bool) -> None:
    for n, k, dtype in ((20, 1024, torch.float16), (33, 676, torch.bfloat16)):
        x, packed = problem(3, n, k, group_size, symmetric, dtype)
        check(name, x, packed, group_size)


@pytest.mark.parametrize(("n", "k"), [(1, 4), (16, 32), (17, 60), (8, 516), (48, 1280), (5, 2044), (64, 4096)])
@pytest.mark.parametrize(("name", "m"), [("select", 1), ("mma_sp", 1), ("mma_sp", 20), ("dot", 9)])
def test_odd_shapes_with_bias(name: str, m: int, n: int, k: int) -> None:
    x, packed = problem(m, n, k, 64, symmetric=False)
    check(name, x, packed, 64, torch.randn(n, generator=torch.Generator().manual_seed(1)).half())


@pytest.mark.parametrize("name", LINEARS)
def test_large_bfloat16_activations(name: str) -> None:
    x, packed = problem(3, 32, 256, 64, dtype=torch.bfloat16, scale=1e4)
    x[0, :8] = 3e4
    check(name, x, packed, 64)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, about the poisoned tokens
@pytest.mark.parametrize("name", LINEARS)
def test_tokens_do_not_see_each_other(name: str) -> None:
    x, packed = problem(5, 32, 300, 64)
    prepared = layout.prepare(packed, group_size=64, k=300)
    clean = run(name, x, prepared)
    x[1], x[3, 7] = float("nan"), float("inf")
    others = [0, 2, 4]
    assert torch.equal(run(name, x, prepared)[others], clean[others])


@pytest.mark.parametrize("name", LINEARS)
def test_one_expert_of_a_stack(name: str) -> None:
    x, packed = problem(2, 20, 64, 32, symmetric=False, lead=(3,))
    prepared = layout.prepare(packed, group_size=32, k=64)
    one = TwoFourInt4(*(None if tensor is None else tensor[1] for tensor in packed))
    alone = layout.prepare(one, group_size=32, k=64)
    assert torch.equal(run(name, x, prepared.expert(1)), run(name, x, alone))


@given(
    st.sampled_from([(), (1,), (2, 3)]),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([32, 64, 96, 128, 256, 1024]),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_layout_round_trip(
    lead: tuple[int, ...], n: int, groups: int, group_size: int, symmetric: bool, seed: int
) -> None:
    _, packed = problem(1, n, 4 * groups, group_size, symmetric, lead=lead, seed=seed)
    prepared = layout.prepare(packed, group_size=group_size, k=4 * groups)
    shapes = layout.prepared_shapes(n, 4 * groups, group=prepared.group, symmetric=symmetric)
    assert {key: getattr(prepared, key).shape[len(lead) :] for key in shapes} == shapes
    restored = layout.restore(prepared, group_size=group_size)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(restored, packed, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 4, 32), (17, 36, 64), (40, 548, 128), (32, 2048, 4096)])
def test_expanded_weight_is_rounded_once(n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    _, packed = problem(1, n, k, group_size, symmetric)
    prepared = layout.prepare(packed, group_size=group_size, k=k)
    tensors = {key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    dense = guarded(torch.full((n, k), float("nan"), dtype=dtype))
    interpret(KERNELS["expand"].jit(), plan.plan_expand(prepared._replace(**tensors), dense, TARGET))
    assert torch.equal(dense, two_four_int4.dequantize(packed, group_size=group_size, columns=k, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("select", Shape(1, 64, 2048)),
        ("select", Shape(4, 128, 1024)),
        ("mma_sp", Shape(1, 128, 2048)),
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


def test_what_can_run() -> None:
    half = torch.float16
    assert plan.can_run((64, 256), half, "sm_80", 64) == (True, "")
    assert plan.can_run((64, 256), half, "sm_80", 1000) == (True, "")
    assert not plan.can_run((64, 256), half, "sm_80", 48)[0]
    assert not plan.can_run((64, 256), torch.float32, "sm_80", 64)[0]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "m", "most"), [("select", 1, 9.8), ("select", 8, 40.0), ("mma_sp", 1, 4.0), ("mma_sp", 8, 4.2)]
)
def test_instructions_per_kept_weight(name: str, m: int, most: float, target: str) -> None:
    kernel, shape = KERNELS[name], Shape(m, 4096, 4096)
    for dtype in DTYPES:
        launch = kernel.example(shape, dtype, target)
        binary = aot.compile_launch(kernel.jit(), launch, target)
        weight_bytes = kernel.weight_bytes(shape, dtype)
        assert aot.instructions_per_weight(launch, binary, kernel.weights(shape), weight_bytes) <= most
        assert binary.spills == 0 and aot.misplaced_fragments(binary.ttgir) == []


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("name", ["select", "mma_sp"])
def test_other_groups_compile_cleanly(name: str, group: int) -> None:
    kernel, shape = KERNELS[name], Shape(4, 4096, 4096)
    for symmetric in (True, False):
        sizes = layout.prepared_shapes(shape.n, shape.k, group=group, symmetric=symmetric)
        tensors = {
            key: torch.empty(size, dtype=torch.uint8 if key == "zeros" else torch.int32, device="meta")
            for key, size in sizes.items()
        }
        prepared = layout.Prepared(**{"zeros": None, **tensors}, group=group, n=shape.n, k=shape.k)
        x = torch.empty((shape.m, shape.k), dtype=torch.bfloat16, device="meta")
        launch = op.PLANS[name](x, prepared, x.new_empty((shape.m, shape.n)), None, TARGET)
        binary = aot.compile_launch(kernel.jit(), launch, TARGET)
        loads = [instruction for instruction in binary.sass.instructions if instruction.is_weight_load]
        assert binary.spills == 0 and aot.misplaced_fragments(binary.ttgir) == []
        assert all(load.width == 16 for load in loads)
        assert not any(i.opcode.startswith(("LDS", "STS", "BAR", "SHFL")) for i in binary.sass.main_loop)
