"""An emulator of the inline PTX that the kernels use, for Triton's interpreter.

`inline_asm_elementwise(asm, constraints, args, ..., pack=p)` runs the text once for every `p` consecutive elements of
its operands; elements narrower than 32 bits are packed into 32-bit registers. Here each register is a numpy array with
one uint32 per such instance, so a whole tile runs at once. Warp-wide instructions (`mma`) take 32 consecutive instances
as the lanes of a warp: that is the layout the compiler gives a contiguous one-dimensional load (`aot.py` guards it).

Semantics follow the PTX ISA (sections 9.7.1 to 9.7.15; fragment layouts of `mma` and `mma.sp` from 9.7.14). Floating
point rounds to nearest even, once per instruction as hardware does. Only what is used here is known; anything else,
modifiers included, raises NotImplementedError.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from triton.runtime import interpreter

Lanes = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_WARP = 32
_LOW, _SIXTEEN = np.uint32(0xFFFF), np.uint32(16)


@contextlib.contextmanager
def emulated_inline_asm() -> Iterator[None]:
    """Give Triton's interpreter inline assembly while the context lasts."""
    cls = interpreter.InterpreterBuilder
    original = cls.create_inline_asm
    cls.create_inline_asm = _create_inline_asm
    try:
        yield
    finally:
        cls.create_inline_asm = original


class _Results:
    """What the interpreter expects of a call with several results."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _create_inline_asm(
    builder: Any, asm: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool, pack: int
) -> _Results:
    shape = np.shape(values[0].data)
    inputs = [registers_of(np.broadcast_to(value.data, shape), pack) for value in values]
    element_types = [getattr(kind, "scalar", kind) for kind in types]
    dtypes = [np.dtype(interpreter._get_np_dtype(kind)) for kind in element_types]
    widths = [max(1, pack * dtype.itemsize // 4) for dtype in dtypes]
    outputs = run(asm, sum(widths), [register for operand in inputs for register in operand])
    handles, start = [], 0
    for dtype, width, kind in zip(dtypes, widths, element_types, strict=True):
        words = np.stack(outputs[start : start + width], axis=1)
        elements = words.view(dtype)[:, :pack] if dtype.itemsize < 4 else words.view(dtype)
        handles.append(interpreter.TensorHandle(np.ascontiguousarray(elements).reshape(shape), kind))
        start += width
    return _Results(handles)


def registers_of(values: npt.NDArray[Any], pack: int) -> list[Lanes]:
    """Split a tile into 32-bit registers, each `[instances]` uint32; `pack` consecutive elements go to one instance."""
    flat = np.ascontiguousarray(values).reshape(-1, pack)
    if flat.dtype.itemsize < 4:
        missing = -(pack * flat.dtype.itemsize) % 4 // flat.dtype.itemsize
        flat = np.ascontiguousarray(np.pad(flat, ((0, 0), (0, missing))))
    words = flat.view(np.uint32)
    return [np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])]


def run(asm: str, outputs: int, inputs: Sequence[Lanes]) -> list[Lanes]:
    """Execute `asm` with `$0 .. $outputs-1` as results and the following operands as `inputs`; returns the results."""
    registers: dict[str, Lanes] = {f"${outputs + i}": value.copy() for i, value in enumerate(inputs)}
    for line in _statements(asm):
        if line.startswith("."):  # register declarations: every register is 32 bits wide here
            continue
        opcode, _, rest = line.partition(" ")
        operands = _operands(rest)
        handler = _handler(opcode)
        handler(opcode, operands, registers)
    return [registers[f"${i}"] for i in range(outputs)]


def _statements(asm: str) -> list[str]:
    text = re.sub(r"//[^\n]*", "", asm).strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    return [" ".join(part.split()) for part in text.split(";") if part.strip()]


def _operands(text: str) -> list[str]:
    """Split at commas outside braces; a braced list stays one operand."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|[^,{}]+", text) if part.strip()]


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def _value(operand: str, registers: dict[str, Lanes]) -> Lanes:
    """A register's content, or an immediate: integer, or `0f` with the bits of a float."""
    if operand in registers:
        return registers[operand]
    bits = int(operand[2:], 16) if operand.startswith(("0f", "0F")) else int(operand.rstrip("U"), 0)
    return np.full(1, bits & 0xFFFFFFFF, np.uint32)


# --- number formats ---


def f32(bits: npt.NDArray[Any]) -> Floats:
    """The fp32 numbers with these bits."""
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


def bits_of(values: npt.NDArray[Any]) -> Lanes:
    """The bits of `values` rounded to fp32."""
    return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)


def bf16_bits(values: npt.NDArray[Any]) -> Lanes:
    """fp64 or narrower to the 16 bits of bf16, to nearest even; NaN is 0x7fff."""
    # fp32 rounded to odd keeps what the second rounding needs to know: bf16 has 16 bits less.
    bits = bits_of(_to_odd_f32(values.astype(np.float64)))
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded.astype(np.uint32)).astype(np.uint32)


def halves(bits: Lanes, kind: str) -> Floats:
    """Both 16-bit numbers of each register as fp32 `[..., 2]`, low half first; `kind` is f16 or bf16."""
    parts = np.stack((bits & _LOW, bits >> 16), axis=-1).astype(np.uint32)
    if kind == "bf16":
        return f32(parts << 16)
    return parts.astype(np.uint16).view(np.float16).astype(np.float32)


def from_halves(values: npt.NDArray[Any], kind: str) -> Lanes:
    """Inverse of `halves`, rounding fp64 or narrower to nearest even."""
    if kind == "bf16":
        parts = bf16_bits(values)
    else:
        with np.errstate(over="ignore"):
            parts = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return (parts[..., 0] | parts[..., 1] << 16).astype(np.uint32)


def _to_odd_f32(values: Doubles) -> Floats:
    """Round to fp32 so that an inexact result has an odd last bit."""
    with np.errstate(all="ignore"):
        near = values.astype(np.float32)
        inexact = np.isfinite(near) & (near.astype(np.float64) != values) & (near.view(np.uint32) & 1 == 0)
        away = np.where(values > near, np.float32(np.inf), np.float32(-np.inf))
        return np.where(inexact, np.nextafter(near, away), near)


def _sum_to_odd(a: Doubles, b: Doubles) -> Doubles:
    """`a + b` so that an inexact sum has an odd last bit; rounding it once more is then the same as rounding once."""
    total = a + b
    shadow = total - a
    error = (a - (total - shadow)) + (b - shadow)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.uint64) & 1 == 0)
    away = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, away), total)


# --- instructions ---

Handler = Callable[[str, list[str], dict[str, Lanes]], None]


def _refuse(opcode: str) -> NoReturn:
    raise NotImplementedError(f"PTX emulation of {opcode}")


def _lop3(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    if opcode != "lop3.b32":
        _refuse(opcode)
    a, b, c = (_value(operand, registers) for operand in operands[1:4])
    table, result = int(operands[4], 0), np.zeros(1, np.uint32)
    for index in range(8):
        if table >> index & 1:
            x, y, z = (value if index & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | (x & y & z)
    registers[operands[0]] = result.astype(np.uint32)


def _prmt(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    if opcode != "prmt.b32":
        _refuse(opcode)
    a, b, selector = (_value(operand, registers) for operand in operands[1:4])
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for byte in range(4):
        pick = selector >> np.uint32(4 * byte) & 0xF
        value = (source >> (8 * (pick & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        signs = np.where(value & 0x80, np.uint32(0xFF), np.uint32(0))
        result |= np.where(pick & 8, signs, value) << np.uint32(8 * byte)
    registers[operands[0]] = result


def _mov(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    if opcode not in ("mov.b32", "mov.u32", "mov.s32", "mov.f32", "mov.b16"):
        _refuse(opcode)
    target, source = operands
    if target.startswith("{"):
        lower, upper = _names(target)
        value = _value(source, registers)
        registers[lower], registers[upper] = value & _LOW, value >> _SIXTEEN
    elif source.startswith("{"):
        low, high = (_value(name, registers) for name in _names(source))
        registers[target] = (low & _LOW) | high << _SIXTEEN
    else:
        registers[target] = _value(source, registers)


def _cvt(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    """Between fp32 and 16-bit floats, and from integers of 8 to 32 bits to floats."""
    match = re.fullmatch(r"cvt(?:\.rn)?\.(f32|f16|bf16|f16x2|bf16x2)\.(f32|f16|bf16|[su](?:8|16|32))", opcode)
    if match is None:
        _refuse(opcode)
    target, source = match[1], match[2]
    values = [_value(operand, registers) for operand in operands[1:]]
    if target.endswith("x2"):  # the first source is the upper half
        pair = np.stack(np.broadcast_arrays(f32(values[1]), f32(values[0])), axis=-1)
        registers[operands[0]] = from_halves(pair, target.removesuffix("x2"))
        return
    number: npt.NDArray[Any]
    if source in ("f16", "bf16"):
        number = halves(values[0], source)[..., 0]
    elif source == "f32":
        number = f32(values[0])
    else:
        signed, unused = source[0] == "s", 32 - int(source[1:])
        number = ((values[0] << np.uint32(unused)).view(np.int32 if signed else np.uint32) >> unused).astype(np.float64)
    if target == "f32":
        registers[operands[0]] = bits_of(number)
    else:
        registers[operands[0]] = from_halves(np.stack((number, np.zeros_like(number)), axis=-1), target)


def _shift(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    value, count = (_value(operand, registers) for operand in operands[1:])
    if opcode == "shl.b32":
        registers[operands[0]] = value << count
    elif opcode == "shr.s32":
        registers[operands[0]] = (value.view(np.int32) >> count.view(np.int32)).view(np.uint32)
    elif opcode in ("shr.b32", "shr.u32"):
        registers[operands[0]] = value >> count
    else:
        _refuse(opcode)


_BITWISE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
}


def _bitwise(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    if opcode not in _BITWISE:
        _refuse(opcode)
    a, b = (_value(operand, registers) for operand in operands[1:])
    registers[operands[0]] = _BITWISE[opcode](a, b)


def _arithmetic(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    """add, sub, mul and fma in f32, f16x2, bf16x2; add, sub, mul.lo and mad.lo in 32-bit integers."""
    name, *modifiers, kind = opcode.split(".")
    values = [_value(operand, registers) for operand in operands[1:]]
    if kind in ("s32", "u32"):
        if modifiers != (["lo"] if name in ("mul", "mad") else []):
            _refuse(opcode)
        a, b, *rest = values
        result = {"add": a + b, "sub": a - b, "mul": a * b, "mad": a * b}[name]
        registers[operands[0]] = result + rest[0] if rest else result
        return
    if kind not in ("f32", "f16x2", "bf16x2") or modifiers not in ([], ["rn"]) or name == "mad":
        _refuse(opcode)
    narrow = kind.removesuffix("x2")
    x, y, *more = ((f32(value) if kind == "f32" else halves(value, narrow)).astype(np.float64) for value in values)
    with np.errstate(all="ignore"):
        if name in ("mul", "fma"):  # products of 24-bit numbers are exact in fp64
            exact = _sum_to_odd(x * y, more[0]) if more else x * y
        else:
            exact = _sum_to_odd(x, y if name == "add" else -y)
        registers[operands[0]] = bits_of(exact) if kind == "f32" else from_halves(exact, narrow)


def _fragments(operand: str, registers: dict[str, Lanes]) -> Lanes:
    """Registers of a braced list as `[warps, 32, registers]`."""
    return np.stack([registers[name].reshape(-1, _WARP) for name in _names(operand)], axis=-1)


def _accumulator(fragment: Floats) -> Floats:
    """`[warps, 32, 4]` fp32 registers of an m16n8 accumulator -> `[warps, 16, 8]`."""
    lane = np.arange(_WARP)
    matrix = np.zeros((len(fragment), 16, 8), np.float32)
    for r in range(4):
        matrix[:, lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2] = fragment[..., r]
    return matrix


def _scatter_accumulator(target: str, matrix: Floats, registers: dict[str, Lanes]) -> None:
    lane = np.arange(_WARP)
    for r, name in enumerate(_names(target)):
        registers[name] = bits_of(matrix[:, lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2]).reshape(-1)


def _mma(opcode: str, operands: list[str], registers: dict[str, Lanes]) -> None:
    """`mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}` and its sparse sister with k32 and ordered metadata."""
    pattern = r"mma(\.sp::ordered_metadata)?\.sync\.aligned\.(m16n8k\d+)\.row\.col\.f32\.(f16|bf16)\.\3\.f32"
    match = re.fullmatch(pattern, opcode)
    if match is None or match[2] != ("m16n8k32" if match[1] else "m16n8k16"):
        _refuse(opcode)
    sparse, kind = match[1] is not None, match[3]
    a = halves(_fragments(operands[1], registers), kind)  # [warps, lane, register, half]
    b = halves(_fragments(operands[2], registers), kind)
    c = _accumulator(f32(_fragments(operands[3], registers)))
    lane = np.arange(_WARP)
    columns = np.zeros((len(b), 8 * b.shape[2], 8), np.float32)  # B as [k, n]
    for r in range(b.shape[2]):
        for half in range(2):
            columns[:, lane % 4 * 2 + 8 * r + half, lane // 4] = b[:, :, r, half]
    rows = np.zeros((len(a), 16, columns.shape[1]), np.float32)  # A as [m, k], expanded when sparse
    for r in range(4):
        row = lane // 4 + 8 * (r % 2)
        column = lane % 4 * 2 + 8 * (r // 2)  # of the first of the pair, in the stored (compressed) order
        if sparse:
            metadata = registers[operands[4]].reshape(-1, _WARP)
            selector = int(operands[5], 0)
            group = column // 2  # one pair is one group of four dense columns
            holder = lane // 4 * 4 + selector * 2 + group // 4  # the lane of the quad that holds this group's bits
            nibble = metadata[:, holder] >> (16 * (r % 2) + 4 * (group % 4)).astype(np.uint32) & 15
            warp = np.arange(len(a))[:, None]
            rows[warp, row, 4 * group + (nibble & 3)] += a[:, :, r, 0]
            rows[warp, row, 4 * group + (nibble >> 2)] += a[:, :, r, 1]
        else:
            for half in range(2):
                rows[:, row, column + half] = a[:, :, r, half]
    with np.errstate(all="ignore"):
        _scatter_accumulator(operands[0], c + rows @ columns, registers)


_HANDLERS: dict[str, Handler] = {
    "lop3": _lop3,
    "prmt": _prmt,
    "mov": _mov,
    "cvt": _cvt,
    "shl": _shift,
    "shr": _shift,
    "mma": _mma,
    **dict.fromkeys(("and", "or", "xor"), _bitwise),
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma"), _arithmetic),
}


def _handler(opcode: str) -> Handler:
    return _HANDLERS.get(opcode.split(".")[0]) or _refuse(opcode)
