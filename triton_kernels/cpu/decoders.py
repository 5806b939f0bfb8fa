"""How the rows of each CPU layout become fp32 weights, a vector at a time; each layout is described at its `prepare`.

A decoder's `row` visits one row and calls `emit(position, weights, slot)`: `weights` belong to the activations from
`position` on. Slots 0 and 1 mark weights that are independent of each other, so that their sums can overlap.

Unsigned codes become floats by setting the mantissa of 2^23: `2^23 + code` is exact, and subtracting `2^23 + zero`
leaves `code - zero`. A high nibble is not even shifted: it is 16 times its code, and so are its zero point and the
inverse of its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .code import BIT, BYTE, FLOAT, INT, LONG, SHORT, Code, Value, vector
from .frame import LANES, WIDTH, Frame, load_floats
from .jit import Machine

Emit = Callable[[Value, Value, int], None]
MAGIC = 2.0**23
MAGIC_BITS = 0x4B000000


@dataclass(frozen=True)
class TwoFour:
    """`values` of a dtype and `masks`, one bit per dense column; see `two_four.py`."""

    machine: Machine
    dtype: int
    fields = ("values", "masks")
    lanes = LANES

    def row(self, code: Code, frame: Frame, row: Value, emit: Emit) -> None:
        padded, width = frame["padded"], WIDTH[self.dtype]
        values = frame["values"] + row * (padded >> 1) * width
        masks = frame["masks"] + row * (padded >> 3)
        with code.loop(0, padded, 2 * LANES) as column:
            for slot in (0, 1):
                start = column + slot * LANES
                kept = load_floats(code, self.dtype, LANES // 2, values + (start >> 1) * width)
                mask = code.load(SHORT, masks + (start >> 3))
                emit(start, expand(code, self.machine, kept, mask), slot)


@dataclass(frozen=True)
class TwoFourInt4:
    """`codes`, `scales`, `zeros` of the kept weights and `masks`; see `two_four_int4.py`."""

    machine: Machine
    stride: int
    symmetric: bool
    fields = ("codes", "scales", "zeros", "masks")
    lanes = LANES

    def row(self, code: Code, frame: Frame, row: Value, emit: Emit) -> None:
        padded = frame["padded"]
        codes, masks = frame["codes"] + row * (padded >> 2), frame["masks"] + row * (padded >> 3)
        for start, scales in _blocks(code, frame, row, self.stride, 4 * LANES, self.symmetric):
            for slot, kept in enumerate(_nibbles(code, codes + (start >> 2), LANES, scales)):
                for half in (0, 1):
                    position = start + (2 * slot + half) * LANES
                    mask = code.load(SHORT, masks + (position >> 3))
                    eight = kept.pick(range(half * 8, half * 8 + 8))
                    emit(position, expand(code, self.machine, eight, mask), half)


@dataclass(frozen=True)
class Integers:
    """`codes`, `scales`, `zeros` of every weight; see `int4.py`."""

    machine: Machine
    bits: int
    stride: int
    symmetric: bool
    fields = ("codes", "scales", "zeros")
    lanes = LANES

    def row(self, code: Code, frame: Frame, row: Value, emit: Emit) -> None:
        padded = frame["padded"]
        if self.bits == 4:
            codes = frame["codes"] + row * (padded >> 1)
            for start, scales in _blocks(code, frame, row, self.stride, 2 * LANES, self.symmetric):
                for slot, weights in enumerate(_nibbles(code, codes + (start >> 1), LANES, scales)):
                    emit(start + slot * LANES, weights, slot)
            return
        codes = frame["codes"] + row * padded
        for start, scales in _blocks(code, frame, row, self.stride, 2 * LANES, self.symmetric, middle=128.0):
            for slot, (scale, zero) in enumerate(scales):
                wide = code.load(vector(BYTE, LANES), codes + start + slot * LANES).convert(INT) | MAGIC_BITS
                weights = (wide.view(vector(FLOAT, LANES)) - (zero + MAGIC).splat(LANES)) * scale.splat(LANES)
                emit(start + slot * LANES, weights, slot)


@dataclass(frozen=True)
class Groups:
    """`codes`, `scales`, `zeros` and `numbers` of the kept groups from `row_start` on; see `group_int4.py`."""

    machine: Machine
    group_size: int
    symmetric: bool
    fields = ("codes", "scales", "zeros", "numbers", "row_start")

    @property
    def lanes(self) -> int:
        return min(self.group_size, LANES)

    def row(self, code: Code, frame: Frame, row: Value, emit: Emit) -> None:
        start, stop = (code.load(LONG, frame["row_start"] + (row + i) * 8) for i in (0, 1))
        size, lanes = self.group_size, self.lanes
        paired = size == lanes
        codes, numbers = frame["codes"], frame["numbers"]
        with code.loop(start, stop, 2 if paired else 1) as entry:
            if paired:
                scales = [_scale(code, frame, entry + i, self.symmetric) for i in (0, 1)]
                for slot, weights in enumerate(_nibbles(code, codes + entry * (size // 2), lanes, scales)):
                    number = code.load(SHORT, numbers + (entry + slot) * 2).convert(LONG)
                    emit(number * size, weights, slot)
            else:
                scales = [_scale(code, frame, entry, self.symmetric)] * 2
                first = code.load(SHORT, numbers + entry * 2).convert(LONG) * size
                for block in range(0, size, 2 * lanes):
                    address = codes + entry * (size // 2) + block // 2
                    for slot, weights in enumerate(_nibbles(code, address, lanes, scales)):
                        emit(first + block + slot * lanes, weights, slot)


def expand(code: Code, machine: Machine, kept: Value, mask: Value) -> Value:
    """16 weights from the 8 kept ones: in order, where the 16-bit `mask` has ones; 0 elsewhere."""
    if machine.has("avx512f"):
        wide = kept.pick([*range(8), *[-1] * 8])
        zero = code.constant(wide.type, 0.0)
        bits = mask.view(vector(BIT, 16))
        return code.intrinsic("llvm.x86.avx512.mask.expand", wide.type, wide, zero, bits, overload=wide.type)
    table = code.table("expand_bytes", _expand_bytes())
    halves = []
    for half in (0, 1):
        entry = table + ((mask >> (8 * half)) & 255).convert(LONG) * 32
        four = range(half * 4, half * 4 + 4)
        if machine.triple.startswith("x86_64"):
            bytes_ = kept.pick([*four, *four]).view(vector(BYTE, 32))
            moved = code.intrinsic("llvm.x86.avx2.pshuf.b", bytes_.type, bytes_, code.load(bytes_.type, entry))
        else:
            bytes_ = kept.pick(four).view(vector(BYTE, 16))
            name, kind = "llvm.aarch64.neon.tbl1", bytes_.type
            parts = [code.load(kind, entry + 16 * i) for i in (0, 1)]
            low, high = (code.intrinsic(name, kind, bytes_, part, overload=kind) for part in parts)
            moved = low.join(high)
        halves.append(moved.view(vector(FLOAT, 8)))
    return halves[0].join(halves[1])


def _expand_bytes() -> bytes:
    """For every mask of eight columns, where each of the 32 result bytes comes from among 16; 128 gives zero."""
    table = bytearray()
    for mask in range(256):
        rank = 0
        for column in range(8):
            if mask >> column & 1:
                table += bytes(4 * (rank % 4) + i for i in range(4))
                rank += 1
            else:
                table += bytes([128] * 4)
    return bytes(table)


Scales = list[tuple[Value, Value]]


def _blocks(
    code: Code, frame: Frame, row: Value, stride: int, block: int, symmetric: bool, middle: float = 8.0
) -> Iterator[tuple[Value, Scales]]:
    """Visit a row in blocks: the first column, and scale and zero point of both halves.

    Groups are whole blocks (`stride` is a multiple of `block`) or half a block each.
    """
    padded = frame["padded"]
    if stride % block:
        with code.loop(0, padded, block) as start:
            first = row * (padded // stride) + start // stride
            yield start, [_scale(code, frame, first + i, symmetric, middle) for i in (0, 1)]
        return
    with code.loop(0, padded, stride) as group:
        scales = [_scale(code, frame, row * (padded // stride) + group // stride, symmetric, middle)] * 2
        if stride <= 4 * block:
            for offset in range(0, stride, block):
                yield group + offset, scales
        else:
            with code.loop(group, group + stride, block) as start:
                yield start, scales


def _scale(code: Code, frame: Frame, number: Value, symmetric: bool, middle: float = 8.0) -> tuple[Value, Value]:
    """Scale and zero point of group `number`."""
    scale = code.load(FLOAT, frame["scales"] + number * 4)
    zero = code.constant(FLOAT, middle) if symmetric else code.load(FLOAT, frame["zeros"] + number * 4)
    return scale, zero


def _nibbles(code: Code, address: Value, lanes: int, scales: Scales) -> list[Value]:
    """The weights of the low and the high nibbles of `lanes` bytes."""
    wide = code.load(vector(BYTE, lanes), address).convert(INT)
    weights = []
    for (scale, zero), mask, factor in zip(scales, (0x0F, 0xF0), (1.0, 16.0), strict=True):
        floats = ((wide & mask) | MAGIC_BITS).view(vector(FLOAT, lanes))
        shifted = floats - (zero * factor + MAGIC).splat(lanes)
        weights.append(shifted * (scale * (1.0 / factor)).splat(lanes))
    return weights
