"""Programs for K-major weights, one output per row: `y = x @ W^T + bias` for a few tokens, and rows made dense."""

from __future__ import annotations

from . import decoders
from .code import FLOAT, LONG, Code, Value, Variable, vector
from .frame import (
    LINE,
    ONCE,
    TEAM,
    Frame,
    Step,
    program,
    read_rows,
    round_up,
    row_pitch,
    share_of,
    write_floats,
    write_sums,
)
from .jit import Machine

DECODERS = {
    "two_four": decoders.TwoFour,
    "two_four_int4": decoders.TwoFourInt4,
    "integers": decoders.Integers,
    "groups": decoders.Groups,
}
LINEAR_FIELDS = ("x", "y", "bias", "dtype", "m", "n", "k", "span", "stride", "padded")
EXPAND_FIELDS = ("y", "rows", "count", "limit", "dtype", "k", "span", "stride", "padded")
SLOTS = 2


def linear(machine: Machine, name: str, config: tuple, tokens: int) -> tuple[str, int]:
    """`LINEAR_FIELDS` and the decoder's: a row is decoded once for every few tokens, from the cache after the first.

    Every token's sum has the same order whatever `tokens` is, and every row belongs to one thread: results depend on
    neither.
    """
    decoder = DECODERS[name](machine, *config)
    # as many accumulators as the registers hold
    together = 4 if machine.has("avx512f") else 2

    def scratch(code: Code, frame: Frame) -> Value:
        return _activation_bytes(code, frame) + frame["m"] * frame["n"] * 4

    def read(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        read_rows(code, frame, frame["scratch"])

    def rows(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        x, pitch, n = frame["scratch"], row_pitch(frame), frame["n"]
        sums = x + _activation_bytes(code, frame)
        start, stop = share_of(code, n, rank, size)
        zero = code.constant(vector(FLOAT, decoder.lanes), 0.0)
        with code.loop(start, stop) as row:
            for first in range(0, tokens, together):
                chunk = range(first, min(first + together, tokens))
                parts = {(m, slot): code.variable(zero) for m in chunk for slot in range(SLOTS)}

                def emit(position: Value, weights: Value, slot: int, parts: dict = parts, chunk: range = chunk) -> None:
                    for m in chunk:
                        token = code.load(weights.type, x + (pitch * m + position) * 4)
                        part: Variable = parts[m, slot]
                        part.set(code.fma(weights, token, part.get()))

                decoder.row(code, frame, row, emit)
                for m in chunk:
                    total = (parts[m, 0].get() + parts[m, 1].get()).sum()
                    code.store(total, sums + (n * m + row) * 4)
        write_sums(code, frame, sums, start, stop)

    return program(machine, (*LINEAR_FIELDS, *decoder.fields), (), scratch, [Step(ONCE, read), Step(TEAM, rows)])


def expand(machine: Machine, name: str, config: tuple) -> tuple[str, int]:
    """`EXPAND_FIELDS` and the decoder's: dense rows y `[count, k]` of the row numbers `rows` (int64, below `limit`)."""
    decoder = DECODERS[name](machine, *config)

    def scratch(code: Code, frame: Frame) -> Value:
        return round_up(frame["padded"] * 4, LINE) * frame["threads"]

    def check(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        with code.loop(0, frame["count"]) as i:
            row = code.load(LONG, frame["rows"] + i * 8)
            with code.when(row.compare("<", 0)):
                frame["status"] = code.long(2)
            with code.when(row.compare(">=", frame["limit"])):
                frame["status"] = code.long(2)

    def rows(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        padded, k, span, stride = (frame[name] for name in ("padded", "k", "span", "stride"))
        dense = frame["scratch"] + round_up(padded * 4, LINE) * rank
        width = code.select(frame["dtype"].compare("==", 0), code.long(4), code.long(2))

        def emit(position: Value, weights: Value, slot: int) -> None:
            code.store(weights, dense + position * 4)

        start, stop = share_of(code, frame["count"], rank, size, unit=1)
        with code.loop(start, stop) as i:
            with code.loop(0, padded) as column:
                code.store(code.constant(FLOAT, 0.0), dense + column * 4)
            decoder.row(code, frame, code.load(LONG, frame["rows"] + i * 8), emit)
            with code.loop(0, (k + span - 1) // span) as run:
                first = run * span
                count, target = code.minimum(k - first, span), frame["y"] + (i * k + first) * width
                write_floats(code, frame["dtype"], dense + run * stride * 4, code.long(0), first, target, count)

    return program(machine, (*EXPAND_FIELDS, *decoder.fields), (), scratch, [Step(ONCE, check), Step(TEAM, rows)])


def _activation_bytes(code: Code, frame: Frame) -> Value:
    return round_up(frame["m"] * row_pitch(frame) * 4, LINE)
