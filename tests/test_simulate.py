"""The simulator against independent formulas: inline PTX, the interpreter beside the compiler, the meter."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from torch.sparse import _semi_structured_conversions as semi_structured
from triton.runtime.errors import InterpreterError

import small_kernels
from halfweight.triton_kernels.aot import compile_launch
from halfweight.triton_kernels.launch import Launch
from halfweight.triton_kernels.simulate import ptx
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

RNG = np.random.default_rng(0)


def words(count: int = 64) -> ptx.Lanes:
    return RNG.integers(0, 2**32, count, dtype=np.uint32)


def run(asm: str, *inputs: ptx.Lanes) -> ptx.Lanes:
    return ptx.run(asm, 1, inputs)[0]


# --- integers ---


@pytest.mark.parametrize("table", range(256))
def test_lop3_is_its_truth_table(table: int) -> None:
    a, b, c = words(), words(), words()
    result = run(f"lop3.b32 $0, $1, $2, $3, {table:#x};", a, b, c)
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        assert ((result >> bit & 1) == (table >> index & 1)).all()
    # The ISA's own definition: the table is the function applied to these three constants.
    assert run(f"lop3.b32 $0, 0xF0, 0xCC, 0xAA, {table:#x};")[0] & 0xFF == table


def test_prmt_picks_bytes_and_signs() -> None:
    a, b, selectors = words(), words(), words()
    result = run("prmt.b32 $0, $1, $2, $3;", a, b, selectors)
    for x, y, selector, value in zip(a.tolist(), b.tolist(), selectors.tolist(), result.tolist(), strict=True):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        expected = 0
        for position in range(4):
            pick = selector >> 4 * position & 15
            byte = source[pick & 7]
            if pick & 8:
                byte = 0xFF if byte & 0x80 else 0
            expected |= byte << 8 * position
        assert value == expected


@pytest.mark.parametrize(
    ("asm", "formula"),
    [
        ("and.b32 $0, $1, $2;", lambda a, b: a & b),
        ("or.b32 $0, $1, $2;", lambda a, b: a | b),
        ("xor.b32 $0, $1, $2;", lambda a, b: a ^ b),
        ("add.s32 $0, $1, $2;", lambda a, b: a + b),
        ("sub.u32 $0, $1, $2;", lambda a, b: a - b),
        ("mul.lo.u32 $0, $1, $2;", lambda a, b: a * b),
        ("mad.lo.s32 $0, $1, $2, $1;", lambda a, b: a * b + a),
        ("shl.b32 $0, $1, 7;", lambda a, b: a << 7),
        ("shr.u32 $0, $1, 7;", lambda a, b: a >> 7),
        ("shr.s32 $0, $1, 7;", lambda a, b: (a - (a >> 31 << 32)) >> 7),
        ("{ .reg .b32 t; mov.b32 t, 0x0000ffff; and.b32 t, t, $1; // low half\n or.b32 $0, t, 0x10000; }",
         lambda a, b: a & 0xFFFF | 0x10000),
        ("{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, l}; }", lambda a, b: a >> 16 | a << 16),
    ],
)  # fmt: skip
def test_integer_instructions(asm: str, formula: Callable[[int, int], int]) -> None:
    a, b = words(), words()
    expected = [formula(x, y) % 2**32 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert run(asm, a, b).tolist() == expected


# --- floats ---

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}  # bits, least and greatest exponent


def rounded(value: Fraction, kind: str) -> float:
    """`value` rounded once to the nearest number of a format, ties to even, from the definition."""
    bits, least, greatest = FORMATS[kind]
    if value == 0:
        return 0.0
    size, exponent = abs(value), least
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - bits + 1)
    result = round(size / step) * step  # Python rounds Fractions to even
    if result >= Fraction(2) ** (greatest + 1):
        return float("inf") if value > 0 else float("-inf")
    return float(result if value > 0 else -result)


def numbers(kind: str, count: int = 400) -> ptx.Lanes:
    """Registers of finite numbers over a range of exponents in which sums and products meet every way of rounding."""
    values = RNG.standard_normal((count, 2)) * 2.0 ** RNG.integers(-9, 9, (count, 2))
    return ptx.bits_of(values[:, 0]) if kind == "f32" else ptx.from_halves(values, kind)


def decoded(register: ptx.Lanes, kind: str) -> list[list[float]]:
    values = ptx.f32(register)[:, None] if kind == "f32" else ptx.halves(register, kind)
    return [[float(value) for value in row] for row in values]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_arithmetic_rounds_once_to_nearest_even(name: str, kind: str) -> None:
    operations: dict[str, Callable[[Fraction, Fraction, Fraction], Fraction]] = {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma": lambda x, y, z: x * y + z,
    }
    operands = [numbers(kind) for _ in range(3)]
    suffix = kind if kind == "f32" else f"{kind}x2"
    sources = "$1, $2, $3" if name == "fma" else "$1, $2"
    result = decoded(run(f"{name}.rn.{suffix} $0, {sources};", *operands), kind)
    for row, *inputs in zip(result, *(decoded(operand, kind) for operand in operands), strict=True):
        for value, x, y, z in zip(row, *inputs, strict=True):
            assert value == rounded(operations[name](Fraction(x), Fraction(y), Fraction(z)), kind)


def test_fma_where_rounding_twice_is_wrong() -> None:
    # (1 + 2^-4)^2 = 1 + 2^-3 + 2^-8 lies half way between two bf16 numbers. The addend breaks the tie, but it is so
    # small that it vanishes in fp32 and in fp64. The same for fp32, half way at 1 + 2^-11 + 2^-24.
    for kind, x in (("bf16", 1 + 2.0**-4), ("f32", 1 + 2.0**-12)):
        for sign in (1, -1):
            values = [np.full((1, 2), value) for value in (x, x, sign * 2.0**-100)]
            encoded = [ptx.bits_of(v[:, 0]) if kind == "f32" else ptx.from_halves(v, kind) for v in values]
            result = run(f"fma.rn.{kind if kind == 'f32' else 'bf16x2'} $0, $1, $2, $3;", *encoded)
            exact = Fraction(x) ** 2 + sign * Fraction(2) ** -100
            assert decoded(result, kind)[0][0] == rounded(exact, kind)
            assert rounded(exact, kind) != rounded(Fraction(x) ** 2 - sign * Fraction(2) ** -100, kind)


def test_arithmetic_keeps_infinities_and_nan() -> None:
    x = ptx.from_halves(np.array([[np.inf, np.nan], [65504.0, -np.inf]]), "f16")
    result = ptx.halves(run("add.f16x2 $0, $1, $2;", x, x), "f16")
    assert np.isposinf(result[0, 0]) and np.isnan(result[0, 1])
    assert np.isposinf(result[1, 0]) and np.isneginf(result[1, 1])


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_conversions_agree_with_torch(kind: str, dtype: torch.dtype) -> None:
    scale = 2.0 ** torch.randint(-30, 17, (4096,), generator=torch.Generator().manual_seed(0))
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * scale
    bits, narrow = values.numpy().view(np.uint32), values.to(dtype)
    expected = narrow.view(torch.int16).numpy().view(np.uint16)
    assert (run(f"cvt.rn.{kind}.f32 $0, $1;", bits) == expected).all()
    pair = run(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", bits, bits[::-1].copy())  # the first source is the upper half
    assert (pair >> 16 == expected).all() and (pair & 0xFFFF == expected[::-1]).all()
    back = run(f"cvt.f32.{kind} $0, $1;", expected.astype(np.uint32))
    assert (ptx.f32(back) == narrow.float().numpy()).all()


def test_integers_convert_to_floats() -> None:
    a = words()
    assert (ptx.f32(run("cvt.rn.f32.u8 $0, $1;", a)) == (a & 0xFF).astype(np.float32)).all()
    assert (ptx.f32(run("cvt.rn.f32.s8 $0, $1;", a)) == a.astype(np.uint8).view(np.int8).astype(np.float32)).all()
    assert (ptx.f32(run("cvt.rn.f32.s32 $0, $1;", a)) == a.view(np.int32).astype(np.float32)).all()


@pytest.mark.parametrize(
    "asm",
    [
        "ex2.approx.f32 $0, $1;",
        "add.rz.f32 $0, $1, $2;",
        "fma.rn.relu.f16x2 $0, $1, $2, $1;",
        "mul.wide.u32 $0, $1, $2;",
        "shl.b64 $0, $1, 3;",
        "cvt.rz.f16.f32 $0, $1;",
        "cvt.rni.s32.f32 $0, $1;",
        "prmt.b32.f4e $0, $1, $2, $1;",
        "@p add.s32 $0, $1, $2;",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0}, {$1}, {$2}, {$1};",
        "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0}, {$1}, {$2}, {$1}, $1, 0x0;",
    ],
)
def test_unknown_instructions_are_refused(asm: str) -> None:
    with pytest.raises(NotImplementedError, match="PTX emulation of"):
        run(asm, words(32), words(32))


# --- tensor cores; fragments element by element, as the ISA's formulas give them ---


def a_fragment(matrix: np.ndarray, kind: str) -> list[ptx.Lanes]:
    """`[16, 16]` -> four registers per lane.

    Element i is at row g (+ 8 for i in 2, 3, 6, 7), column 2t + i % 2 (+ 8 for i >= 4).
    """
    registers = np.zeros((4, 32, 2))
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            registers[i // 2, lane, i % 2] = matrix[row, thread * 2 + i % 2 + (8 if i >= 4 else 0)]
    return [ptx.from_halves(register, kind) for register in registers]


def b_fragment(matrix: np.ndarray, kind: str) -> list[ptx.Lanes]:
    """`[k, 8]` -> k/8 registers per lane: element i is at row 2t + i%2 + 8*(i//2), column g."""
    registers = np.zeros((len(matrix) // 8, 32, 2))
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(2 * len(registers)):
            registers[i // 2, lane, i % 2] = matrix[thread * 2 + i % 2 + 8 * (i // 2), group]
    return [ptx.from_halves(register, kind) for register in registers]


def c_fragment(matrix: np.ndarray) -> list[ptx.Lanes]:
    """`[16, 8]` fp32 -> four registers per lane: element i is at row g (+8 for i >= 2), column 2t + i%2."""
    registers = np.zeros((4, 32), np.float32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            registers[i, lane] = matrix[group + (8 if i >= 2 else 0), thread * 2 + i % 2]
    return [ptx.bits_of(register) for register in registers]


def small(shape: tuple[int, ...]) -> np.ndarray:
    """Integers that both 16-bit formats hold exactly, so that sums in any order are exact."""
    return RNG.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma(kind: str) -> None:
    warps = [(small((16, 16)), small((16, 8)), small((16, 8))) for _ in range(2)]
    inputs = [
        [np.concatenate(parts) for parts in zip(*fragments, strict=True)]
        for fragments in (
            [a_fragment(a, kind) for a, _, _ in warps],
            [b_fragment(b, kind) for _, b, _ in warps],
            [c_fragment(c) for _, _, c in warps],
        )
    ]
    asm = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    result = ptx.run(asm, 4, [register for operand in inputs for register in operand])
    expected = [np.concatenate(parts) for parts in zip(*(c_fragment(a @ b + c) for a, b, c in warps), strict=True)]
    for register, wanted in zip(result, expected, strict=True):
        assert (ptx.f32(register) == ptx.f32(wanted)).all()


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    """A 2:4 matrix of non-zero small integers, fp16."""
    scores = torch.from_numpy(RNG.random((rows, columns // 4, 4)))
    keep = torch.zeros_like(scores).scatter_(2, scores.argsort(2)[..., :2], 1).reshape(rows, columns)
    values = torch.from_numpy(RNG.integers(1, 9, (rows, columns))) * torch.from_numpy(
        RNG.choice([-1, 1], (rows, columns))
    )
    return (values * keep).to(torch.float16)


def torch_metadata(dense: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Kept values `[rows, columns/2]` and metadata `[rows, columns/16]` (16 bits: four groups), from torch's converter.

    torch stores the metadata in the order of its own kernels; its scatter offsets undo that.
    """
    values, reordered = semi_structured.sparse_semi_structured_from_dense_cutlass(dense)
    rows, columns = reordered.shape
    offsets = semi_structured._calculate_meta_reordering_scatter_offsets(rows, columns, reordered.dtype, "cpu")
    metadata = reordered.flatten()[offsets].reshape(rows, columns).numpy().view(np.uint16)
    return values.float().numpy(), metadata.astype(np.uint32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_mma_with_torchs_metadata(kind: str, selector: int) -> None:
    dense = two_of_four(32, 32)
    values, metadata = torch_metadata(dense)
    tile = slice(16 * selector, 16 * selector + 16)
    # The order in which CUTLASS's reference `reorder_meta` stores 32 rows of 16-bit metadata: row m of column k goes to
    # word (m % 8) * 4 + m / 8, then 2x2 blocks are swizzled so that rows g and g + 8 of one column share a 32-bit word.
    # Lane l of a warp holds word l, and the two 16-row tiles are told apart by the sparsity selector.
    lanes = np.zeros(32, np.uint32)
    for m in range(32):
        for k in range(2):
            row, column = (m % 8) * 4 + m // 8, k
            if row % 2 == 0 and column == 1:
                row, column = row + 1, 0
            elif row % 2 == 1 and column == 0:
                row, column = row - 1, 1
            lanes[row] |= metadata[m, k] << np.uint32(16 * column)
    b, c = small((32, 8)), small((16, 8))
    # Compressed A has the fragment layout of a dense 16 x 16 A.
    inputs = [*a_fragment(values[tile], kind), *b_fragment(b, kind), *c_fragment(c), lanes]
    asm = (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
        f"{{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, {selector:#x};"
    )
    result = ptx.run(asm, 4, inputs)
    for register, wanted in zip(result, c_fragment(dense[tile].float().numpy() @ b + c), strict=True):
        assert (ptx.f32(register) == ptx.f32(wanted)).all()


# --- inline assembly through the interpreter ---


def test_packed_assembly_sees_consecutive_elements() -> None:
    a, b, c = (torch.from_numpy(words(128).view(np.int32)) for _ in range(3))
    y = torch.zeros(128, dtype=torch.int32)
    # Two elements per instance: results cross over, so the element order matters.
    asm = "{ xor.b32 $0, $3, $4; add.s32 $1, $2, $7; }"
    constants = {"SIZE": 128, "ASM": asm, "PACK": 2, "IN": "=r,=r,r,r,r,r,r,r"}
    interpret(small_kernels.assembly, Launch((1,), {"a_ptr": a, "b_ptr": b, "c_ptr": c, "y_ptr": y}, constants))
    assert (y[0::2] == (a[1::2] ^ b[0::2])).all()
    assert (y[1::2] == a[0::2] + c[1::2]).all()


def test_narrow_elements_share_a_register() -> None:
    values = RNG.integers(0, 256, (3, 4), dtype=np.uint8)
    (register,) = ptx.registers_of(values, 4)
    assert register.tolist() == [int.from_bytes(row.tobytes(), "little") for row in values]
    (single,) = ptx.registers_of(values.astype(np.uint16), 1)
    assert single.tolist() == values.flatten().tolist()


# --- the interpreter beside the compiler ---


def check_row_dot(rows: int = 6, columns: int = 300) -> None:
    w, x = torch.randn(rows, columns), torch.randn(columns)
    y = torch.full((rows,), float("nan"))
    interpret(small_kernels.row_dot, small_kernels.row_dot_launch(w, x, y))
    torch.testing.assert_close(y, 2 * w @ x, rtol=1e-5, atol=1e-4)


def test_interpreting_and_compiling_take_turns() -> None:
    import triton.language as tl

    launch = small_kernels.row_dot_launch(*(torch.empty(s, device="meta") for s in ((64, 512), (512,), (64,))))
    before = dict(vars(tl)), dict(vars(tl.tensor))
    check_row_dot()
    first = compile_launch(small_kernels.row_dot, launch, "sm_80")
    check_row_dot()
    second = compile_launch(small_kernels.row_dot, launch, "sm_90")
    assert first.registers > 0 and second.sass.instructions
    assert compile_launch(small_kernels.row_dot, launch, "sm_80").code == first.code
    assert (dict(vars(tl)), dict(vars(tl.tensor))) == before
    assert type(small_kernels.row_dot).__name__ == type(small_kernels._scaled).__name__ == "JITFunction"


def test_a_failing_kernel_leaves_the_compiler_usable() -> None:
    broken = Launch((1,), {"a_ptr": torch.zeros(32, dtype=torch.int32)}, {"SIZE": 32, "ASM": "?", "PACK": 1, "IN": "r"})
    with pytest.raises(Exception):  # noqa: B017  whatever the interpreter makes of missing arguments
        interpret(small_kernels.assembly, broken)
    launch = small_kernels.row_dot_launch(*(torch.empty(s, device="meta") for s in ((64, 512), (512,), (64,))))
    compile_launch(small_kernels.row_dot, launch, "sm_90")
    check_row_dot()


# --- the meter ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_meter_counts_what_the_formula_says(dtype: torch.dtype) -> None:
    rows, columns = 10, 1024
    w, x, y = guarded(torch.randn(rows, columns).to(dtype)), guarded(torch.randn(columns).to(dtype)), torch.zeros(16)
    launch = small_kernels.row_dot_launch(w, x, guarded(y)[:rows], block_n=4)
    metering = meter(small_kernels.row_dot, launch)
    size = dtype.itemsize
    assert metering.arguments["w_ptr"].dram_bytes == metering.arguments["w_ptr"].l2_bytes == rows * columns * size
    assert metering.arguments["x_ptr"].dram_bytes == columns * size
    assert metering.arguments["x_ptr"].l2_bytes == 3 * columns * size  # once per program
    assert metering.arguments["y_ptr"].requested == rows * 4
    assert metering.arguments["y_ptr"].dram_bytes == 40  # two sectors, and the tensor ends in the second
    assert metering.dram_bytes == (rows + 1) * columns * size + 40
    assert metering.atomics == 0
    # Programs of 4, 4 and 2 rows, each with x and one sector of y.
    busiest, total = 5 * columns * size + 32, (rows + 3) * columns * size + 3 * 32
    assert metering.imbalance == pytest.approx(busiest / (total / 3))


def test_meter_counts_atomics() -> None:
    x, y = torch.ones(64), torch.zeros(1)
    metering = meter(small_kernels.add_atomically, Launch((4,), {"x_ptr": x, "y_ptr": guarded(y)}, {"BLOCK": 16}))
    assert metering.atomics == 4
    assert metering.arguments["x_ptr"].dram_bytes == 256


def test_out_of_bounds_names_program_and_line() -> None:
    x, y = guarded(torch.ones(40)), guarded(torch.zeros(48))
    launch = Launch((3,), {"x_ptr": x, "y_ptr": y, "size": 40}, {"BLOCK": 16})
    with pytest.raises(InterpreterError, match=r"8 lanes out of bounds, program \(2, 0, 0\).*small_kernels\.py:\d+"):
        meter(small_kernels.overrun, launch)
    check_row_dot()  # and the hooks are gone


def test_guarded_tensors_have_room_on_both_sides() -> None:
    room = torch.zeros(48)
    x, y = room[:16], room[16:]
    meter(small_kernels.overrun, Launch((2,), {"x_ptr": x, "y_ptr": y, "size": 16}, {"BLOCK": 16}))  # reads y, unseen
    separate = Launch((2,), {"x_ptr": guarded(x), "y_ptr": guarded(y), "size": 16}, {"BLOCK": 16})
    with pytest.raises(InterpreterError, match="out of bounds"):
        meter(small_kernels.overrun, separate)
    original = torch.randn(3, 5)
    copy = guarded(original)
    assert torch.equal(copy, original) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
