"""The CPU kernels against fp64 dense products of what their formats decode to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("llvmlite")

from cpu_cases import (
    CASES,
    FEW,
    TOKENS,
    TOLERANCE,
    check,
    groups_case,
    integers_case,
    layer_case,
    layer_entries,
    quantized,
    relative_error,
    seeded,
    select_case,
    two_four_case,
    two_four_int4_case,
)
from halfweight.triton_kernels.cpu import (
    group_int4,
    input_select,
    int4,
    jit,
    matmul,
    tied,
    two_four,
    two_four_int4,
)
from halfweight.triton_kernels.formats import groups, integers
from halfweight.triton_kernels.formats import two_four as two_four_format
from halfweight.triton_kernels.formats import two_four_int4 as two_four_int4_format
from halfweight.triton_kernels.formats.bits import to_bits
from halfweight.triton_kernels.formats.input_select import InputSelection

pytestmark = pytest.mark.skipif(not jit.available()[0], reason=jit.available()[1])


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_tokens(name: str) -> None:
    check(CASES[name](), TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_activations(name: str, dtype: torch.dtype) -> None:
    check(CASES[name](), (2, 9, 70), dtype)


@pytest.mark.parametrize("name", ["two_four", "int4", "groups"])
def test_passes_of_the_kernel_are_one_after_the_other(name: str) -> None:
    case = CASES[name]()
    x = torch.randn(13, case.k, generator=seeded())
    assert torch.equal(case.run(x, None), torch.cat([case.run(x[:8], None), case.run(x[8:], None)]))


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
    check(select_case(101, widths, norms=True, rank=rank, dtype=dtype), (9, 40), dtype)


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


@pytest.mark.parametrize("rank", [0, 20])
@pytest.mark.parametrize("widths", [[70], [33, 1, 36]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_token_reads_its_count(dtype: torch.dtype, widths: list[int], rank: int) -> None:
    check(select_case(101, widths, norms=rank > 1, rank=rank, topk=True), (1, 3, 8, 9), dtype)
    check(select_case(53, widths, "integers", rank=rank, topk=True), (1, 9), dtype)
    check(select_case(53, widths, "groups", rank=rank, topk=True), (1, 9), dtype)


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
