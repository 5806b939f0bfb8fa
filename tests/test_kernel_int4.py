"""Dense integers on GPUs: interpreted kernels against an fp64 reference, bytes metered, machine code read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import FormatError, integers
from halfweight.triton_kernels.formats.integers import Integers, Quantized
from halfweight.triton_kernels.int4 import layout, op, plan, reference
from halfweight.triton_kernels.launch import NVIDIA, Shape

pytest.importorskip("triton")

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

TARGET = "sm_90"
DTYPES = (torch.float16, torch.bfloat16)
KERNELS = {kernel.name.partition(".")[2]: kernel for kernel in op.KERNELS}
MANY = (9, 16, 33, 63)


class Problem:
    """A random weight of `bits` in groups, in file order (`packed`) and in GPU order (`prepared`)."""

    def __init__(
        self, n: int, k: int, *, bits: int = 4, group_size: int = 64, symmetric: bool = True, lead: tuple[int, ...] = ()
    ) -> None:
        self.settings = {"bits": bits, "group_size": group_size}
        generator = torch.Generator().manual_seed(n + k)
        groups = (*lead, n, -(-k // group_size))
        quantized = Quantized(
            torch.randint(2**bits, (*lead, n, k), generator=generator, dtype=torch.uint8),
            (torch.rand(groups, generator=generator) + 0.1).half(),
            None if symmetric else torch.randint(2**bits, groups, generator=generator, dtype=torch.uint8),
        )
        self.packed = integers.pack(quantized, **self.settings)
        self.prepared = layout.prepare(self.packed, columns=k, **self.settings)

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(x.double(), self.packed, bias=bias, **self.settings)


def inputs(m: int, k: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))).to(dtype)


def run(name: str, x: Tensor, prepared: layout.Prepared, bias: Tensor | None = None, **more: torch.dtype) -> Tensor:
    """y (fp32, poisoned with NaN beforehand) of one interpreted launch; every tensor between red zones."""
    y = guarded(torch.full((x.shape[0], prepared.rows), float("nan")))
    tensors = {key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    bias = None if bias is None else guarded(bias)
    launch = op.PLANS[name](guarded(x), prepared._replace(**tensors), y, bias, TARGET, **more)
    interpret(KERNELS[name].jit(), launch)
    return y


def run_expand(prepared: layout.Prepared) -> Tensor:
    weight = guarded(torch.full((prepared.rows, prepared.columns), float("nan")))
    interpret(KERNELS["expand"].jit(), plan.plan_expand(prepared, weight, TARGET))
    return weight


def error(y: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "m"), [("simt", m) for m in range(1, 9)] + [("fragment", m) for m in (*range(1, 10), 16, 32)]
)
def test_any_number_of_tokens(name: str, m: int) -> None:
    problem, x = Problem(24, 328), inputs(m, 328, DTYPES[m % 2])
    assert error(run(name, x, problem.prepared), problem.expected(x)) < 1e-5


@pytest.mark.parametrize(
    ("m", "dot_dtype", "bound"), [(9, torch.float32, 1e-5), *((m, torch.float16, 3e-3) for m in MANY)]
)
def test_dot_expands_on_chip(m: int, dot_dtype: torch.dtype, bound: float) -> None:
    problem, x = Problem(72, 584, symmetric=False), inputs(m, 584)
    bias = torch.randn(72, generator=torch.Generator().manual_seed(0))
    y = run("dot", x, problem.prepared, bias, dot_dtype=dot_dtype)
    assert error(y, problem.expected(x, bias)) < bound


NUMBERS = [(bits, group, symmetric) for bits in (4, 8) for group in (32, 64, 256, 4096) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), NUMBERS)
@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_numbers_and_group_sizes(name: str, bits: int, group_size: int, symmetric: bool) -> None:
    problem = Problem(16, 552, bits=bits, group_size=group_size, symmetric=symmetric)
    for dtype in DTYPES if name == "fragment" else DTYPES[:1]:
        x = inputs(1, 552, dtype)
        assert error(run(name, x, problem.prepared), problem.expected(x)) < 1e-5


@pytest.mark.parametrize("name", ["fragment", "simt"])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 8, 32), (17, 40, 32), (33, 576, 128), (5, 2056, 64), (40, 2048, 128), (16, 4096, 64)]
)
def test_odd_shapes_with_bias(name: str, n: int, k: int, group_size: int) -> None:
    problem, x = Problem(n, k, group_size=group_size), inputs(3, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).half()
    assert error(run(name, x, problem.prepared, bias), problem.expected(x, bias)) < 1e-5


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), NUMBERS)
def test_expanding_is_exact_in_fp32(bits: int, group_size: int, symmetric: bool) -> None:
    problem = Problem(19, 328, bits=bits, group_size=group_size, symmetric=symmetric)
    assert torch.equal(
        run_expand(problem.prepared), integers.dequantize(problem.packed, columns=328, **problem.settings)
    )


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_large_bfloat16_activations(name: str) -> None:
    problem, x = Problem(32, 512, symmetric=False), inputs(3, 512, torch.bfloat16, scale=1e4)
    x[0, :8] = 3e4
    assert error(run(name, x, problem.prepared), problem.expected(x)) < 1e-5


@pytest.mark.parametrize(("name", "m"), [("fragment", 5), ("fragment", 12), ("simt", 5), ("dot", 12)])
def test_tokens_do_not_see_each_other(name: str, m: int) -> None:
    problem, x = Problem(32, 520), inputs(m, 520)
    clean = run(name, x, problem.prepared)
    x[1], x[3, 7] = float("nan"), float("inf")
    others = [i for i in range(m) if i not in (1, 3)]
    assert torch.equal(run(name, x, problem.prepared)[others], clean[others])


@pytest.mark.parametrize("name", ["fragment", "simt"])
def test_one_expert_of_a_stack(name: str) -> None:
    problem, x = Problem(20, 64, symmetric=False, lead=(3,)), inputs(2, 64)
    for expert in range(3):
        packed = Integers(*(None if t is None else t[expert] for t in problem.packed))
        expected = reference.linear(x.double(), packed, **problem.settings)
        assert error(run(name, x, problem.prepared.expert(expert)), expected) < 1e-5


def test_a_slice_of_tiles_is_a_weight() -> None:
    problem = Problem(72, 128, symmetric=False)
    dense = integers.dequantize(problem.packed, columns=128, **problem.settings)
    parts = [run_expand(op.rows_of(problem.prepared, first, first + 2)) for first in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), dense)


@given(
    st.sampled_from([(), (1,), (2, 3)]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 96, 128, 256, 1000]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_layout_round_trip(lead: tuple[int, ...], n: int, k: int, bits: int, group_size: int, symmetric: bool) -> None:
    if group_size % 32 and group_size < k:
        return
    problem = Problem(n, k, bits=bits, group_size=group_size, symmetric=symmetric, lead=lead)
    group = layout.kernel_group(group_size, k)
    shapes = layout.prepared_shapes((*lead, n, k), bits=bits, group=group, symmetric=symmetric)
    assert {key: tuple(getattr(problem.prepared, key).shape) for key in shapes} == shapes
    restored = layout.restore(problem.prepared, group_size=group_size)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(restored, problem.packed, strict=True))


def test_groups_that_do_not_fit_a_fragment_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 32"):
        Problem(16, 128, group_size=48)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (1, 32, 2048)) for name in ("fragment", "fragment_zeros", "fragment_int8", "simt")),
        *((name, (4, 64, 1024)) for name in ("fragment", "fragment_zeros", "fragment_int8", "simt")),
        ("fragment", (8, 64, 576)),
        ("fragment", (32, 32, 1024)),
        ("dot", (16, 64, 512)),
        ("expand", (64, 64, 1024)),
    ],
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
    assert plan.choose(1, 4096, 4096, half, "sm_90") == "fragment"
    assert plan.choose(32, 4096, 4096, half, "sm_90") == "fragment"
    assert plan.choose(33, 4096, 4096, half, "sm_90") == "dot"
    assert plan.choose(64, 4096, 4096, half, "sm_90") == "expand"
    assert plan.choose(8, 4096, 4096, half, "sm_90", asm=False) == "simt"
    assert plan.choose(9, 4096, 4096, half, "gfx942") == "dot"
    assert plan.can_run((64, 64), half, "sm_80") == (True, "")
    assert not plan.can_run((64, 64), torch.float32, "sm_80")[0]
    assert not plan.can_run((64, 64), half, "sm_70")[0]
    assert not plan.can_run((2**30, 64), half, "sm_80")[0]
    assert [plan.fragment_tiles(1, n, 4096, 128).warps_k for n in (512, 4096, 8192, 32768)] == [8, 8, 4, 1]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "m"), [("fragment", 1), ("fragment", 8), ("simt", 1)])
def test_machine_code(name: str, m: int, target: str) -> None:
    kernel, shape = KERNELS[name], Shape(m, 4096, 4096)
    for dtype in DTYPES:
        launch = kernel.example(shape, dtype, target)
        binary = aot.compile_launch(kernel.jit(), launch, target)
        assert binary.spills == 0 and aot.misplaced_fragments(binary.ttgir) == []
        cost = aot.instructions_per_weight(launch, binary, kernel.weights(shape), kernel.weight_bytes(shape, dtype))
        assert kernel.budget is not None
        if m == 1 or name == "fragment":  # tensor cores take eight tokens for the price of one
            assert cost <= kernel.budget[dtype] * (1.0 if target == "sm_90" else 1.3)


def test_assembly_is_for_nvidia_only() -> None:
    assert all(set(kernel.targets) <= set(NVIDIA) for kernel in op.KERNELS if kernel.inline_asm)
