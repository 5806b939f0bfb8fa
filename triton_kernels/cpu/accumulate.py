"""Weighted sums of rows: the inner loops of the input-major programs.

`entries first` to `last` of a list name rows of the weight and the activations (one per token) that multiply them;
their products are added, entry after entry, to `sums[token, column]`.
"""

from __future__ import annotations

from collections.abc import Callable

from .code import BYTE, FLOAT, INT, LONG, Code, Value, vector
from .decoders import MAGIC, MAGIC_BITS, Groups
from .frame import FP32, LANES, WIDTH, Frame, load_floats, store_floats

Decode = Callable[[Value, int], list[Value]]
TOGETHER = 4
# Sums of one token that stay in the first-level cache while rows pass by.
CACHED_COLUMNS = 2048


class Plain:
    """Floating-point rows, `pitch` bytes apart."""

    block = LANES

    def __init__(self, code: Code, dtype: int, base: Value, pitch: Value) -> None:
        self.code, self.dtype, self.base, self.pitch = code, dtype, base, pitch
        self.piece = code.long(1 << 40)

    def open(self, row: Value, column: Value) -> Decode:
        address = self.base + row * self.pitch

        def decode(column: Value, lanes: int) -> list[Value]:
            return [load_floats(self.code, self.dtype, lanes, address + column * WIDTH[self.dtype])]

        return decode


class IntegerRows:
    """Rows of `codes`, `scales`, `zeros`; see `int4.py`."""

    block = 2 * LANES

    def __init__(self, code: Code, frame: Frame, bits: int, stride: int, symmetric: bool) -> None:
        self.code, self.frame, self.bits, self.stride, self.symmetric = code, frame, bits, stride, symmetric
        self.piece = code.long(max(stride, self.block))

    def open(self, row: Value, column: Value) -> Decode:
        """For the columns of one piece: they share their scales."""
        code, columns = self.code, self.frame["columns"]
        address = self.frame["codes"] + row * (columns * self.bits >> 3)
        first = row * (columns // self.stride) + column // self.stride
        halves = []
        for half in (0, 1):
            number = first + (half if self.stride < self.block else 0)
            factor = 16.0 if self.bits == 4 and half else 1.0
            scale = code.load(FLOAT, self.frame["scales"] + number * 4) * (1.0 / factor)
            zero = code.constant(FLOAT, float(1 << (self.bits - 1)))
            if not self.symmetric:
                zero = code.load(FLOAT, self.frame["zeros"] + number * 4)
            halves.append((scale.splat(LANES), (zero * factor + MAGIC).splat(LANES)))

        def decode(column: Value, lanes: int) -> list[Value]:
            if self.bits == 8:
                wide = [code.load(vector(BYTE, LANES), address + column + i * LANES).convert(INT) for i in (0, 1)]
            else:
                both = code.load(vector(BYTE, LANES), address + (column >> 1)).convert(INT)
                wide = [both & 0x0F, both & 0xF0]
            floats = [(w | MAGIC_BITS).view(vector(FLOAT, LANES)) for w in wide]
            return [(f - zero) * scale for f, (scale, zero) in zip(floats, halves, strict=True)]

        return decode


def accumulate(
    code: Code,
    source: Plain | IntegerRows,
    tokens: int,
    rows: Value,
    values: Value,
    first: Value,
    last: Value,
    start: Value,
    stop: Value,
    sums: Value,
    pitch: Value,
) -> None:
    """Add entries `first` to `last` to columns `start` to `stop` of the sums, `pitch` bytes apart.

    A few entries pass together, so that the sums are read and written once for them.
    """
    wide = CACHED_COLUMNS // tokens
    many = first + ((last - first) & -TOGETHER)
    with code.loop(start // wide, (stop + (wide - 1)) // wide) as number:
        low, high = _cut(code, number, code.long(wide), start, stop)
        for begin, end, together in ((first, many, TOGETHER), (many, last, 1)):
            with code.loop(begin, end, together) as entry:
                numbers = [code.load(LONG, rows + (entry + i) * 8) for i in range(together)]
                factors = [
                    [code.load(FLOAT, values + ((entry + i) * tokens + m) * 4) for m in range(tokens)]
                    for i in range(together)
                ]
                pieces = code.loop(low // source.piece, (high + (source.piece - 1)) // source.piece)
                with pieces as piece:
                    left, right = _cut(code, piece, source.piece, low, high)
                    decoders = [source.open(row, left) for row in numbers]
                    whole = left + ((right - left) & -source.block)
                    with code.loop(left, whole, source.block) as column:
                        _add(code, decoders, factors, column, LANES, sums, pitch)
                    if source.block == LANES:
                        with code.loop(whole, right) as column:
                            _add(code, decoders, factors, column, 1, sums, pitch)


def scatter(
    code: Code,
    frame: Frame,
    decoder: Groups,
    tokens: int,
    rows: Value,
    values: Value,
    first: Value,
    last: Value,
    offset: Value,
    sums: Value,
    pitch: Value,
) -> None:
    """Add entries `first` to `last` where their kept groups lie; row numbers count from row `offset` of the weight."""
    with code.loop(first, last) as entry:
        row = code.load(LONG, rows + entry * 8) + offset
        factors = [code.load(FLOAT, values + (entry * tokens + m) * 4) for m in range(tokens)]

        def emit(position: Value, weights: Value, slot: int, factors: list[Value] = factors) -> None:
            for m, factor in enumerate(factors):
                place = sums + pitch * m + position * 4
                total = load_floats(code, FP32, weights.lanes, place)
                store_floats(code, FP32, code.fma(weights, factor.splat(weights.lanes), total), place)

        decoder.row(code, frame, row, emit)


def _add(
    code: Code,
    decoders: list[Decode],
    factors: list[list[Value]],
    column: Value,
    lanes: int,
    sums: Value,
    pitch: Value,
) -> None:
    """Add a block of columns of some rows."""
    weights = [decode(column, lanes) for decode in decoders]
    for i in range(len(weights[0])):
        for m in range(len(factors[0])):
            place = sums + pitch * m + (column + i * lanes) * 4
            total = load_floats(code, FP32, lanes, place)
            for row, x in zip(weights, factors, strict=True):
                total = code.fma(row[i], x[m].splat(lanes), total)
            store_floats(code, FP32, total, place)


def _cut(code: Code, number: Value, width: Value, start: Value, stop: Value) -> tuple[Value, Value]:
    """Block `number` of `width` columns, cut to lie between `start` and `stop`."""
    return code.maximum(number * width, start), code.minimum((number + 1) * width, stop)
