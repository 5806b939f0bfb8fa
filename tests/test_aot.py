"""Every kernel, compiled for every GPU it declares: no spills, wide weight loads, clean loops, instruction budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

import small_kernels
from halfweight.triton_kernels import aot, registry
from halfweight.triton_kernels.launch import AMD, NVIDIA, Kernel, Launch, Shape

SQUARE, RAGGED = (4096, 4096), (1000, 1544)
SHARED_MEMORY = ("LDS", "STS", "LDSM", "SHFL", "BAR")
# Launches that no operator makes, because these rules would be broken: see the op's `choose`.
UNUSED = {("two_four_int4.mma_sp", RAGGED)}
CASES = [(kernel, target) for kernel in registry.kernels() for target in kernel.targets]


def launches(kernel: Kernel, target: str) -> Iterator[tuple[Shape, torch.dtype, Launch]]:
    """The launches that the operator would make: smallest and largest M, 1 and 8; a square and a ragged weight.

    Compiling takes most of the tests' time, so the other GPUs of a family get less than its first: sm_80 both dtypes at
    the smallest and largest M, the rest one dtype each.
    """
    least, most = kernel.m_range
    fp16, bf16 = torch.float16, torch.bfloat16
    inner = [m for m in (1, 8) if least < m < most]
    square = {"sm_90": product((least, *inner, most), (fp16, bf16)), "sm_80": product((least, most), (fp16, bf16))}
    cases = [(Shape(m, *SQUARE), dtype) for m, dtype in square.get(target, [(least, fp16), (most, bf16)])]
    if target == "sm_90":
        cases += [(Shape(least, *RAGGED), bf16), (Shape(most, *RAGGED), fp16)]
    for shape, dtype in cases:
        if (kernel.name, shape[1:]) in UNUSED:
            continue
        yield shape, dtype, kernel.example(shape, dtype, target)


def broken_rules(binary: aot.Binary) -> list[str]:
    """What a compiled launch does that its kernel promises not to do."""
    broken = [f"spills {binary.spills}"] if binary.spills else []
    return broken + [f"fragments in {layout}" for layout in aot.misplaced_fragments(binary.ttgir)]


def broken_code_rules(kernel: Kernel, binary: aot.Binary) -> list[str]:
    """The same, of the machine code; NVIDIA only."""
    broken = []
    if kernel.weight_bytes(Shape(1, *SQUARE), torch.float16):
        loads = [instruction for instruction in binary.sass.instructions if instruction.is_weight_load]
        narrow = sorted({load.opcode for load in loads if load.width != 16})
        broken += ["no weight loads"] if not loads else []
        broken += [f"narrow weight loads {narrow}"] if narrow else []
    if kernel.loop_is_clean:
        found = sorted({i.opcode for i in binary.sass.main_loop if i.opcode.startswith(SHARED_MEMORY)})
        broken += [f"in the main loop {found}"] if found else []
    return broken


@pytest.mark.parametrize(("kernel", "target"), CASES, ids=[f"{kernel.name}-{target}" for kernel, target in CASES])
def test_kernel_compiles_cleanly(kernel: Kernel, target: str) -> None:
    variants: dict[str, tuple[Shape, torch.dtype, Launch]] = {}
    for shape, dtype, launch in launches(kernel, target):
        variant = repr((aot.specialise(kernel.jit(), launch), launch.num_warps, launch.num_stages))
        variants.setdefault(variant, (shape, dtype, launch))
    for index, (shape, dtype, launch) in enumerate(variants.values(), 1):
        binary = aot.compile_launch(kernel.jit(), launch, target)
        assert not broken_rules(binary), (shape, dtype)
        # Disassembling takes as long as compiling; where code differs little, the largest M stands for all.
        if target in ("sm_80", "sm_90") or (target in NVIDIA and index == len(variants)):
            assert not broken_code_rules(kernel, binary), (shape, dtype)
        if target == "sm_90" and shape == (1, *SQUARE) and kernel.budget is not None:
            weights, weight_bytes = kernel.weights(shape), kernel.weight_bytes(shape, dtype)
            cost = aot.instructions_per_weight(launch, binary, weights, weight_bytes)
            assert cost <= kernel.budget[dtype], (dtype, cost)


@pytest.mark.parametrize("op", registry.OPS)
def test_every_operator_has_a_kernel_for_amd(op: str) -> None:
    assert any("gfx942" in kernel.targets for kernel in registry.kernels(op))


def test_the_registry_is_consistent() -> None:
    names = [kernel.name for kernel in registry.kernels()]
    assert len(names) == len(set(names))
    for kernel in registry.kernels():
        assert kernel.op in registry.OPS and kernel.name.startswith(f"{kernel.op}.")
        assert set(kernel.targets) <= {*NVIDIA, *AMD} and 1 <= kernel.m_range[0] <= kernel.m_range[1]
        if kernel.inline_asm:  # PTX
            assert not set(kernel.targets) & {*AMD}
    with pytest.raises(KeyError):
        registry.kernels("none")


# --- the rules themselves, on kernels that break them ---


def example(**changes: object) -> Kernel:
    """`row_dot` as if it were one of ours."""

    def launch(shape: Shape, dtype: torch.dtype, target: str) -> Launch:
        tensors = [
            torch.empty(size, dtype=dtype, device="meta") for size in ((shape.n, shape.k), (shape.k,), (shape.n,))
        ]
        return dataclasses.replace(small_kernels.row_dot_launch(*tensors), num_warps=1)

    facts = Kernel(
        name="row_dot",
        op="row_dot",
        function="unused",
        example=launch,
        bytes=lambda shape, dtype: 0,
        minimum_bytes=lambda shape, dtype: 0,
        weights=lambda shape: shape.n * shape.k,
        weight_bytes=lambda shape, dtype: shape.n * shape.k * dtype.itemsize,
        budget=None,
        m_range=(1, 1),
    )
    return dataclasses.replace(facts, **changes)  # type: ignore[arg-type]


def check(kernel: Kernel, shape: Shape, target: str = "sm_90", num_warps: int = 1) -> list[str]:
    launch = dataclasses.replace(kernel.example(shape, torch.float16, target), num_warps=num_warps)
    binary = aot.compile_launch(small_kernels.row_dot, launch, target)
    return broken_rules(binary) + (broken_code_rules(kernel, binary) if target in NVIDIA else [])


def test_a_good_kernel_breaks_no_rule() -> None:
    assert check(example(loop_is_clean=True), Shape(1, 4096, 4096)) == []
    assert check(example(), Shape(1, 4096, 4096), "gfx942") == []


def test_narrow_weight_loads_are_found() -> None:
    (found,) = check(example(), Shape(1, 4096, 4097))  # an odd stride
    assert found.startswith("narrow weight loads ['LDG.E.EF.U16")


def test_shared_memory_in_the_main_loop_is_found() -> None:
    (found,) = check(example(loop_is_clean=True), Shape(1, 4096, 4096), num_warps=4)
    assert found.startswith("in the main loop") and "LDS" in found
    assert check(example(), Shape(1, 4096, 4096), num_warps=4) == []


@pytest.mark.parametrize(("pack", "clean"), [(4, True), (2, False)])
def test_misplaced_fragments_are_found(pack: int, clean: bool) -> None:
    name, c = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "{$4, $5, $6, $7}"
    asm = f"{name} {{$0, $1, $2, $3}}, {c}, {{$8, $9}}, {c};"
    if pack == 2:  # compiles, but a lane then holds two instances
        asm = "// mma\n mov.b32 $0, $2; mov.b32 $1, $3;"
    constraints = ",".join(["=r"] * pack + ["r"] * 3 * pack)
    constants = {"SIZE": 128, "ASM": asm, "PACK": pack, "IN": constraints}
    tensors = {
        name: torch.empty(128, dtype=torch.int32, device="meta") for name in ("a_ptr", "b_ptr", "c_ptr", "y_ptr")
    }
    binary = aot.compile_launch(small_kernels.assembly, Launch((1,), tensors, constants, num_warps=1), "sm_80")
    assert (aot.misplaced_fragments(binary.ttgir) == []) is clean
