"""The CPU kernels against fp64 dense products of what their formats decode to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from halfweight.triton_kernels.cpu import (
    group_int4,
    input_select,
    input_select_int4,
    int4,
    jit,
    matmul,
    tied,
    two_four,
    two_four_int4,
)
from halfweight.triton_kernels.formats import groups, groups_layer, integers
from halfweight.triton_kernels.formats import two_four as two_four_format
from halfweight.triton_kernels.formats import two_four_int4 as two_four_int4_format
from halfweight.triton_kernels.formats.bits import from_bits, to_bits
from halfweight.triton_kernels.formats.groups import KeptGroups
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.formats.integers import Quantized

pytestmark = pytest.mark.skipif(not jit.available()[0], reason=jit.available()[1])
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)
FEW = (1, 3, 9)
TOLERANCE = 1e-6
# what each dtype's rounding of y costs
ROUNDING = {torch.float32: TOLERANCE, torch.bfloat16: 3e-3, torch.float16: 4e-4}


class Case(NamedTuple):
    """`run(x, bias)` and what it should be, in fp64."""

    run: Callable[[Tensor, Tensor | None], Tensor]
    expected: Callable[[Tensor], Tensor]
    k: int
    n: int
    prepared: Any = None
    dense: Tensor | None = None
    rows: Any = None


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN when anything is."""
    return float(((actual.double() - expected).square().mean() / expected.square().mean()).sqrt())


def quantized(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> Quantized:
    generator, per_group = seeded(1), (shape[0], -(-shape[1] // group_size))
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 2**bits, per_group, generator=generator, dtype=torch.uint8)
    return Quantized(codes, torch.rand(per_group, generator=generator).half(), zeros)


def two_four_mask(n: int, k: int) -> Tensor:
    """Two of every four, and sometimes fewer."""
    order = torch.rand(n, k // 4, 4, generator=seeded(2)).argsort(-1).argsort(-1).flatten(1)
    return (order < 2) & (torch.rand(n, k, generator=seeded(3)) < 0.9)


def kept_groups(n: int, k: int, group_size: int, kept: int, symmetric: bool, segments: int = 1) -> KeptGroups:
    generator = seeded(4)
    per_segment = -(-k // group_size) // segments
    picks = torch.rand(n, segments, per_segment, generator=generator).argsort(-1)[..., : kept // segments]
    numbers = (picks.sort(-1).values + torch.arange(segments)[:, None] * per_segment).flatten(1)
    codes = torch.randint(0, 16, (n, kept, group_size), generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 16, (n, kept), generator=generator, dtype=torch.uint8)
    return KeptGroups(codes, torch.rand(n, kept, generator=generator).half(), zeros, numbers)


def rows_case(module: Any, prepared: Any, dense: Tensor) -> Case:
    wide = dense.double()
    n, k = dense.shape
    run = lambda x, bias: module.linear(x, prepared, bias)  # noqa: E731
    return Case(run, lambda x: x.double() @ wide.T, k, n, prepared, dense, module.rows(prepared))


def two_four_case(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    weight = torch.randn(n, k, generator=seeded()).where(two_four_mask(n, k), torch.tensor(0.0)).to(dtype)
    return rows_case(two_four, two_four.prepare(*two_four_format.pack(weight)), weight)


def two_four_int4_case(n: int, k: int, group_size: int = 32, symmetric: bool = False) -> Case:
    packed = two_four_int4_format.pack(
        quantized((n, k), 4, group_size, symmetric), two_four_mask(n, k), group_size=group_size
    )
    dense = two_four_int4_format.dequantize(packed, group_size=group_size, columns=k)
    return rows_case(two_four_int4, two_four_int4.prepare(packed, group_size=group_size, columns=k), dense)


def integers_case(n: int, k: int, bits: int = 4, group_size: int = 32, symmetric: bool = False) -> Case:
    packed = integers.pack(quantized((n, k), bits, group_size, symmetric), bits=bits, group_size=group_size)
    options: dict[str, int] = {"bits": bits, "group_size": group_size, "columns": k}
    return rows_case(int4, int4.prepare(packed, **options), integers.dequantize(packed, **options))


def groups_case(
    n: int, k: int, group_size: int = 16, kept: int = 3, symmetric: bool = False, segments: int = 1
) -> Case:
    packed = groups.pack(kept_groups(n, k, group_size, kept, symmetric, segments), k, segments=segments)
    prepared = group_int4.prepare(packed, k, segments=segments)
    return rows_case(group_int4, prepared, groups.dequantize(packed, k, segments=segments))


def layer_entries(n: int, k: int, group_size: int) -> groups_layer.LayerGroups:
    """Rows with different counts, some of them empty."""
    kept = torch.rand(n, -(-k // group_size), generator=seeded(5)) < torch.rand(n, 1, generator=seeded(6))
    kept[[0, n - 1]] = False
    start = torch.cat((torch.zeros(1), kept.sum(1).cumsum(0))).int()
    every = kept_groups(1, int(kept.sum()) * group_size, group_size, int(kept.sum()), False)
    assert every.zeros is not None
    entries = KeptGroups(every.codes[0], every.scales[0], every.zeros[0], kept.nonzero()[:, 1])
    return groups_layer.pack(entries, start, k)


def layer_case(n: int, k: int, group_size: int = 16) -> Case:
    packed = layer_entries(n, k, group_size)
    return rows_case(group_int4, group_int4.prepare_layer(packed, k), groups_layer.dequantize(packed, k))


def input_selection(parts: int, k: int, n: int, norms: bool, rank: int, dtype: torch.dtype) -> InputSelection:
    generator = seeded(7)
    return InputSelection(
        to_bits(torch.rand(parts, generator=generator) + 0.2),
        to_bits(torch.rand(parts, k, generator=generator) + 0.5) if norms else None,
        torch.randn(parts, k, rank, generator=generator).to(dtype) if rank else None,
        torch.randn(n, rank, generator=generator).to(dtype) if rank else None,
    )


def select_case(
    k: int,
    widths: list[int],
    kind: str = "plain",
    norms: bool = False,
    rank: int = 0,
    symmetric: bool = False,
    bits: int = 4,
    group_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    n = sum(widths)
    selection = input_selection(len(widths), k, n, norms, rank, dtype)
    if kind == "plain":
        dense = torch.randn(k, n, generator=seeded()).to(dtype)
        module, prepared = input_select, input_select.prepare(dense, selection, widths)
    elif kind == "integers":
        options = {"bits": bits, "group_size": group_size}
        packed = [integers.pack(quantized((k, width), bits, group_size, symmetric), **options) for width in widths]
        pairs = zip(packed, widths, strict=True)
        dense = torch.cat([integers.dequantize(part, columns=width, **options) for part, width in pairs], 1)
        module, prepared = input_select_int4, input_select_int4.prepare(packed, selection, widths, **options)
    else:
        parts = []
        for width in widths:
            total = -(-width // group_size)
            parts.append(groups.pack(kept_groups(k, width, group_size, (total + 1) // 2, symmetric), width))
        dense = torch.cat([groups.dequantize(part, width) for part, width in zip(parts, widths, strict=True)], 1)
        module, prepared = input_select_int4, input_select_int4.prepare_groups(parts, selection, widths)

    def expected(x: Tensor) -> Tensor:
        outputs, start = [], 0
        for p, width in enumerate(widths):
            columns = slice(start, start + width)
            size = x.float().abs() * (1.0 if selection.norms is None else from_bits(selection.norms)[p])
            kept = size > from_bits(selection.thresholds)[p]
            y = x.double().where(kept, torch.tensor(0.0).double()) @ dense[:, columns].double()
            if selection.V is not None and selection.U is not None:
                rest = x.double().masked_fill(kept, 0.0)
                y = y + rest @ selection.V[p].double() @ selection.U[columns].double().T
            outputs.append(y)
            start += width
        return torch.cat(outputs, 1)

    return Case(lambda x, bias: module.linear(x, prepared, bias), expected, k, n, prepared, dense)


def check(case: Case, tokens: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    for m in tokens:
        x = (torch.randn(m, case.k, generator=seeded(m)) * scale).to(dtype)
        bias = torch.randn(case.n, generator=seeded(9)).to(dtype)
        with poisoned():
            y, plain = case.run(x, bias), case.run(x, None)
        assert y.dtype == dtype and y.shape == (m, case.n)
        assert relative_error(y, case.expected(x) + bias.double()) < ROUNDING[dtype], m
        assert relative_error(plain, case.expected(x)) < ROUNDING[dtype], m


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# One of everything, at odd sizes.
CASES: dict[str, Callable[[], Case]] = {
    "two_four": lambda: two_four_case(37, 100),
    "two_four_int4": lambda: two_four_int4_case(37, 100),
    "int4": lambda: integers_case(37, 101),
    "int8": lambda: integers_case(37, 101, bits=8),
    "groups": lambda: groups_case(37, 101),
    "layer": lambda: layer_case(37, 101),
    "select": lambda: select_case(53, [33, 20, 17], norms=True, rank=5),
    "select_int4": lambda: select_case(53, [33, 20, 17], "integers", rank=5),
    "select_groups": lambda: select_case(53, [33, 20, 17], "groups", rank=5),
}


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_tokens(name: str) -> None:
    check(CASES[name](), TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_activations(name: str, dtype: torch.dtype) -> None:
    check(CASES[name](), (2, 9), dtype)


@pytest.mark.parametrize("name", ["two_four", "groups", "select"])
def test_large_bfloat16_activations_do_not_overflow(name: str) -> None:
    check(CASES[name](), (2,), torch.bfloat16, scale=3e4)


@pytest.mark.parametrize("name", CASES)
def test_a_token_depends_on_neither_the_others_nor_the_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    monkeypatch.setattr(jit, "BYTES_PER_THREAD", 1)
    x = torch.randn(8, case.k, generator=seeded())
    everyone = case.run(x, None)
    for m in (1, 3, 6):
        assert torch.equal(case.run(x[:m], None), everyone[:m])
    assert torch.equal(torch.cat([case.run(x[m : m + 1], None) for m in range(8)]), everyone)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(case.run(x, None), everyone)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_one_token_does_not_leak_into_another(name: str) -> None:
    case = CASES[name]()
    x = torch.randn(3, case.k, generator=seeded())
    x[1] = float("nan")
    y = case.run(x, None)
    assert torch.equal(y[[0, 2]], case.run(x[[0, 2]], None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [4, 8, 32, 36, 1028])
def test_two_four(dtype: torch.dtype, k: int) -> None:
    case = two_four_case(19, k, dtype)
    check(case, FEW)
    values, meta = two_four.restore(case.prepared)
    assert case.dense is not None
    assert torch.equal(two_four_format.unpack(values, meta), case.dense)
    two_four_format.validate(values, meta, (19, k))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, 12, 32, 64, 96, 128, 512])
def test_two_four_int4(group_size: int, symmetric: bool) -> None:
    case = two_four_int4_case(19, 332, group_size, symmetric)
    check(case, FEW)
    restored = two_four_int4.restore(case.prepared)
    two_four_int4_format.validate(restored, (19, 332), group_size=group_size, symmetric=symmetric)
    assert torch.equal(two_four_int4_format.dequantize(restored, group_size=group_size, columns=332), case.dense)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [2, 8, 16, 24, 32, 128, 332])
def test_integers(bits: int, group_size: int, symmetric: bool) -> None:
    case = integers_case(19, 331, bits, group_size, symmetric)
    check(case, FEW)
    restored = int4.restore(case.prepared)
    integers.validate(restored, (19, 331), bits=bits, group_size=group_size, symmetric=symmetric)
    assert torch.equal(integers.dequantize(restored, bits=bits, group_size=group_size, columns=331), case.dense)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kept", [1, 3, 5])
@pytest.mark.parametrize("group_size", groups.SIZES)
def test_groups(group_size: int, kept: int, symmetric: bool) -> None:
    k = group_size * 5 - 3
    case = groups_case(19, k, group_size, kept, symmetric)
    check(case, FEW)
    restored = group_int4.restore(case.prepared)
    groups.validate(restored, (19, k), group_size=group_size, kept=kept)
    assert torch.equal(groups.dequantize(restored, k), case.dense)


@pytest.mark.parametrize("segments", [2, 8])
def test_segments(segments: int) -> None:
    case = groups_case(19, 16 * 16, 16, 8, segments=segments)
    check(case, FEW)
    restored = group_int4.restore(case.prepared, segments=segments)
    assert torch.equal(groups.dequantize(restored, 256, segments=segments), case.dense)


@pytest.mark.parametrize("group_size", groups.SIZES)
def test_layer_balanced_groups(group_size: int) -> None:
    k = group_size * 5 - 3
    check(layer_case(19, k, group_size), FEW)
    packed = layer_entries(19, k, group_size)
    restored = group_int4.restore_layer(group_int4.prepare_layer(packed, k))
    assert all(torch.equal(a, b) for a, b in zip(restored, packed, strict=True))


def test_nothing_kept_is_the_bias() -> None:
    case = groups_case(5, 64, 16, kept=0)
    bias = torch.randn(5)
    for m in (1, 9):
        assert torch.equal(case.run(torch.randn(m, 64), bias), bias.expand(m, 5))


def test_values_a_group_does_not_keep_are_not_read() -> None:
    # one kept group makes an odd row, whose second entry is a filler
    case = groups_case(4, 64, 16, kept=1)
    for row in range(4):
        x = torch.full((1, 64), float("nan"))
        start = int(case.prepared.numbers[2 * row]) * 16
        x[:, start : start + 16] = 1.0
        assert bool(case.run(x, None)[0, row].isfinite())


@pytest.mark.parametrize("rank", [0, 20])
@pytest.mark.parametrize("widths", [[70], [33, 1, 36]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_selected_inputs(dtype: torch.dtype, widths: list[int], rank: int) -> None:
    check(select_case(101, widths, norms=rank > 1, rank=rank, dtype=dtype), FEW)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (4, 16), (4, 32), (4, 128), (8, 16), (8, 64), (4, 48)])
def test_selected_inputs_of_integers(bits: int, group_size: int, symmetric: bool) -> None:
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    check(select_case(53, [70], "integers", **options), (1, 9))
    check(select_case(53, [33, 20, 17], "integers", **options), (1, 9))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", groups.SIZES)
def test_selected_inputs_of_groups(group_size: int, symmetric: bool) -> None:
    for widths in ([70], [33, 20, 17]):
        check(select_case(53, widths, "groups", group_size=group_size, symmetric=symmetric), (1, 9))


def test_selected_outputs_beyond_one_cached_block() -> None:
    for kind in ("plain", "integers", "groups"):
        check(select_case(20, [4200], kind, group_size=32), (1, 4))


def test_rows_nobody_selects_are_not_read() -> None:
    # a NaN in a skipped row would spread to every output
    weight = torch.randn(40, 24)
    weight[1::2] = float("nan")
    prepared = input_select.prepare(weight, InputSelection(to_bits(torch.tensor([0.5]))))
    x = torch.ones(3, 40)
    x[:, 1::2] = 0.5
    assert relative_error(input_select.linear(x, prepared), x[:, ::2].double() @ weight[::2].double()) < TOLERANCE


def test_selecting_nothing_is_the_branch_alone() -> None:
    case = select_case(40, [24], rank=4)
    x = torch.randn(2, 40) * 1e-3
    assert relative_error(case.run(x, None), case.expected(x)) < TOLERANCE
    assert not select_case(40, [24]).run(x, None).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_tied(bits: int) -> None:
    packed = integers.pack(quantized((97, 50), bits, 16, False), bits=bits, group_size=16)
    prepared = tied.prepare(packed, bits=bits, group_size=16, columns=50)
    dense = integers.dequantize(packed, bits=bits, group_size=16, columns=50)
    ids = torch.tensor([[0, 96, 5], [5, 7, 31]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(tied.lookup(ids, prepared, dtype), dense[ids].to(dtype))
    x = torch.randn(2, 3, 50)
    assert relative_error(tied.logits(x, prepared), x.double() @ dense.double().T) < TOLERANCE
    for bad in (-1, 97):
        with pytest.raises(IndexError):
            tied.lookup(torch.tensor([1, bad]), prepared)
    assert tied.lookup(torch.empty(0, dtype=torch.int64), prepared).shape == (0, 50)


def test_dense_rows_are_exact() -> None:
    for name in ("two_four", "two_four_int4", "int4", "int8", "groups", "layer"):
        case = CASES[name]()
        assert case.dense is not None
        every = torch.arange(case.n)
        assert torch.equal(matmul.dense_rows(case.rows, every, torch.float32), case.dense.float()), name
        assert torch.equal(matmul.dense_rows(case.rows, every, torch.bfloat16), case.dense.to(torch.bfloat16)), name


def test_shapes_of_activations() -> None:
    case = CASES["int4"]()
    x = torch.randn(2, 3, 2, case.k)
    assert torch.equal(case.run(x[:, :, 0], None).flatten(0, 1), case.run(x[:, :, 0].reshape(6, -1), None))
    assert case.run(torch.randn(0, case.k), None).shape == (0, case.n)
    assert case.run(torch.randn(case.k), None).shape == (case.n,)
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 5\]"):
        case.run(torch.randn(3, 5), None)
    with pytest.raises(ValueError, match="float64"):
        case.run(torch.randn(3, case.k).double(), None)


def test_numbers_that_cannot_be_rounded_survive() -> None:
    case = two_four_case(4, 32)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    bias = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=torch.bfloat16)
    y = case.run(x, bias)[0]
    assert bool(y[0].isnan()) and y[1:].tolist() == [float("inf"), -float("inf"), 0.0]


@pytest.mark.parametrize("name", CASES)
def test_other_machines_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 code runs wherever AVX-512 does. Two weights by shuffled bytes instead of one instruction."""
    if not jit.host().triple.startswith("x86_64"):
        pytest.skip("not an x86 CPU")
    case = CASES[name]()
    x = torch.randn(3, case.k, generator=seeded())
    here = case.run(x, None)
    small = jit.Machine(jit.host().triple, "haswell", "+avx2,+fma,+f16c,+bmi,+bmi2,+ssse3,-avx512f")
    monkeypatch.setattr(jit, "host", lambda: small)
    jit.kernel.cache_clear()
    try:
        assert torch.equal(case.run(x, None), here)
        check(case, (1, 9))
    finally:
        jit.kernel.cache_clear()


@pytest.mark.parametrize("name", ["two_four", "groups"])
def test_kernels_compile_for_arm(name: str) -> None:
    import llvmlite.binding as llvm

    from halfweight.triton_kernels.cpu import rows

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = jit.Machine("aarch64-unknown-linux-gnu", "cortex-a76", "+neon")
    text, _ = rows.linear(machine, name, {"two_four": (1,), "groups": (16, False)}[name], 2)
    target = llvm.Target.from_triple(machine.triple).create_target_machine(cpu=machine.cpu, features=machine.features)
    assembly = target.emit_assembly(llvm.parse_assembly(text))
    assert "fmla" in assembly and (name != "two_four" or "tbl" in assembly)


def test_nothing_is_loaded_before_the_first_call() -> None:
    code = "import halfweight, halfweight.triton_kernels.cpu.int4, sys; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
