"""Programs for input-major weights: `y = select(x) @ W^T + bias`, plus the low-rank branch for what is not selected.

Activations are compared with their part's threshold once; rows of W^T that no token selects are never read. Outputs
are columns here. Dense formats split the columns over the threads. Kept groups lie anywhere in a row, so for them the
rows are split, into a fixed number of chunks whose sums are added in order. Either way a token's sum has the same order
whatever the other tokens and the number of threads: a token that does not select a row adds 0 times it.
"""

from __future__ import annotations

from typing import NamedTuple

from .accumulate import IntegerRows, Plain, accumulate, scatter
from .code import FLOAT, LONG, Code, Value, vector
from .decoders import Groups
from .frame import (
    LANES,
    LINE,
    ONCE,
    TEAM,
    WIDTH,
    Frame,
    Step,
    element_width,
    program,
    read_floats,
    round_up,
    share_of,
    write_floats,
)
from .jit import Machine

FIELDS = (
    *("x", "y", "bias", "dtype", "m", "n", "k", "columns", "span", "stride"),
    *("parts", "count", "thresholds", "norms", "V", "U", "rank", "token_stride"),
)
DECODER_FIELDS = {"plain": ("weights",), "integers": ("codes", "scales", "zeros"), "groups": Groups.fields}
AREAS = (
    *("floats", "kept_rows", "kept_values", "kept_starts", "rest_rows", "rest_values", "rest_starts"),
    *("part_z", "z", "order", "sums", "part_sums"),
)
PART_FIELDS = 4
CHUNKS = 8


class Part(NamedTuple):
    """One of the fused linears: its columns in the CPU layout, and where its `width` outputs begin in y."""

    start: Value
    stop: Value
    first: Value
    width: Value


def linear(machine: Machine, name: str, config: tuple, branch: int, tokens: int) -> tuple[str, int]:
    """`FIELDS` and the decoder's. `branch` is the dtype of V `[P, K, r]` and U^T `[r, columns]`, or -1 for none."""

    def areas(code: Code, frame: Frame) -> dict[str, Value]:
        count, k, rank, columns = (frame[name] for name in ("count", "k", "rank", "columns"))
        lists = {"rows": count * k * 8, "values": count * k * (4 * tokens), "starts": count * ((CHUNKS + 1) * 8)}
        sums, z, none = columns * (4 * tokens), count * rank * (4 * tokens), code.long(0)
        sizes = {
            "floats": k * (4 * tokens),
            **{f"kept_{key}": size for key, size in lists.items()},
            **{f"rest_{key}": size if branch >= 0 else none for key, size in lists.items()},
            **{"part_z": z * CHUNKS, "z": z, "order": rank * 8},
            **{"sums": sums, "part_sums": sums * CHUNKS if name == "groups" else none},
        }
        return {area: round_up(size, LINE) for area, size in sizes.items()}

    def scratch(code: Code, frame: Frame) -> Value:
        total = code.long(0)
        for size in areas(code, frame).values():
            total = total + size
        return total

    def select(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        place = frame["scratch"]
        for area, extent in areas(code, frame).items():
            frame[area] = place
            place = place + extent
        read_floats(code, frame["dtype"], frame["x"], frame["floats"], frame["k"] * tokens)
        with code.loop(0, frame["count"]) as p:
            _select(code, frame, p, tokens, branch >= 0)
        with code.loop(0, frame["rank"]) as r:
            code.store(r, frame["order"] + r * 8)

    def reduce_rest(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        r, width = frame["rank"], WIDTH[branch]
        start, stop = share_of(code, frame["count"] * CHUNKS, rank, size, unit=1)
        with code.loop(start, stop) as task:
            p = task // CHUNKS
            entries = frame["rest_starts"] + (task + p) * 8
            source = Plain(code, branch, frame["V"] + p * frame["k"] * r * width, r * width)
            target = frame["part_z"] + task * r * (4 * tokens)
            _zero(code, target, r * tokens)
            values = frame["rest_values"] + p * frame["k"] * (4 * tokens)
            rows = frame["rest_rows"] + p * frame["k"] * 8
            first, last = (code.load(LONG, entries + i * 8) for i in (0, 1))
            accumulate(code, source, tokens, rows, values, first, last, code.long(0), r, target, r * 4)

    def sum_rest(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        r = frame["rank"]
        with code.loop(0, frame["count"]) as p, code.loop(0, r) as i:
            for m in range(tokens):
                total = code.constant(FLOAT, 0.0)
                for chunk in range(CHUNKS):
                    source = frame["part_z"] + (((p * CHUNKS + chunk) * tokens + m) * r + i) * 4
                    total = total + code.load(FLOAT, source)
                code.store(total, frame["z"] + ((p * r + i) * tokens + m) * 4)

    def chunks(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        decoder = Groups(machine, *config)
        start, stop = share_of(code, frame["count"] * CHUNKS, rank, size, unit=1)
        with code.loop(start, stop) as task:
            p = task // CHUNKS
            part, pitch = _part(code, frame, p), frame["columns"] * 4
            target = frame["part_sums"] + (task - p * CHUNKS) * pitch * tokens
            for m in range(tokens):
                _zero(code, target + pitch * m + part.start * 4, part.stop - part.start)
            entries = frame["kept_starts"] + (task + p) * 8
            first, last = (code.load(LONG, entries + i * 8) for i in (0, 1))
            rows = frame["kept_rows"] + p * frame["k"] * 8
            values = frame["kept_values"] + p * frame["k"] * (4 * tokens)
            scatter(code, frame, decoder, tokens, rows, values, first, last, p * frame["k"], target, pitch)

    def finish(code: Code, frame: Frame, rank: Value, size: Value) -> None:
        k, pitch, r = frame["k"], frame["columns"] * 4, frame["rank"]
        unit = LANES if name == "plain" else 2 * LANES
        start, stop = share_of(code, frame["columns"], rank, size, unit)
        with code.loop(0, frame["count"]) as p:
            part = _part(code, frame, p)
            low = code.maximum(start, part.start)
            high = code.minimum(stop, part.stop)
            with code.when(low.compare("<", high)):
                if name == "groups":
                    _sum_chunks(code, frame, tokens, low, high)
                else:
                    for m in range(tokens):
                        _zero(code, frame["sums"] + pitch * m + low * 4, high - low)
                    source: Plain | IntegerRows
                    if name == "plain":
                        (dtype,) = config
                        source = Plain(code, dtype, frame["weights"], frame["columns"] * WIDTH[dtype])
                    else:
                        source = IntegerRows(code, frame, *config)
                    last = code.load(LONG, frame["kept_starts"] + (p * (CHUNKS + 1) + CHUNKS) * 8)
                    rows, values = frame["kept_rows"] + p * k * 8, frame["kept_values"] + p * k * (4 * tokens)
                    accumulate(code, source, tokens, rows, values, code.long(0), last, low, high, frame["sums"], pitch)
                if branch >= 0:
                    branch_rows = Plain(code, branch, frame["U"], frame["columns"] * WIDTH[branch])
                    z = frame["z"] + p * r * (4 * tokens)
                    accumulate(
                        code, branch_rows, tokens, frame["order"], z, code.long(0), r, low, high, frame["sums"], pitch
                    )
                _write(code, frame, tokens, part, low, high)

    steps = [Step(ONCE, select)]
    if branch >= 0:
        steps += [Step(TEAM, reduce_rest), Step(ONCE, sum_rest)]
    if name == "groups":
        steps.append(Step(TEAM, chunks))
    steps.append(Step(TEAM, finish))
    return program(machine, (*FIELDS, *DECODER_FIELDS[name]), AREAS, scratch, steps)


def _part(code: Code, frame: Frame, p: Value) -> Part:
    return Part(*(code.load(LONG, frame["parts"] + (p * PART_FIELDS + i) * 8) for i in range(PART_FIELDS)))


def _select(code: Code, frame: Frame, p: Value, tokens: int, rest: bool) -> None:
    """List the rows of W^T that part `p` reads, and their activations (0 where a token does not select the row).

    `starts` cuts the list at fixed rows, into CHUNKS. The rest likewise, when the branch wants it.
    """
    k = frame["k"]
    own = [frame["thresholds"] + p * 4 + frame["token_stride"] * m for m in range(tokens)]
    thresholds = [code.load(FLOAT, address) for address in own]
    zero = code.constant(FLOAT, 0.0)
    lists = ["kept", "rest"] if rest else ["kept"]
    counts = {kind: code.variable(code.long(0)) for kind in lists}
    starts = {kind: frame[f"{kind}_starts"] + p * ((CHUNKS + 1) * 8) for kind in lists}
    rows = {kind: frame[f"{kind}_rows"] + p * k * 8 for kind in lists}
    values = {kind: frame[f"{kind}_values"] + p * k * (4 * tokens) for kind in lists}
    with code.loop(0, code.long(CHUNKS)) as chunk:
        for kind in lists:
            code.store(counts[kind].get(), starts[kind] + chunk * 8)
        with code.loop(chunk * k // CHUNKS, (chunk + 1) * k // CHUNKS) as row:
            norm = code.variable(code.constant(FLOAT, 1.0))
            with code.when(frame["norms"].compare("!=", 0)):
                norm.set(code.load(FLOAT, frame["norms"] + (p * k + row) * 4))
            wanted = {kind: code.long(0) for kind in lists}
            for m in range(tokens):
                x = code.load(FLOAT, frame["floats"] + (k * m + row) * 4)
                # A NaN is not below the threshold: its token reads it.
                below = (x.absolute() * norm.get()).compare("<=", thresholds[m])
                parts = {"kept": code.select(below, zero, x), "rest": code.select(below, x, zero)}
                for kind in lists:
                    code.store(parts[kind], values[kind] + (counts[kind].get() * tokens + m) * 4)
                    # not equal to zero, and a NaN is not
                    left_out = below if kind == "kept" else parts[kind].compare("==", 0.0)
                    wanted[kind] = wanted[kind] | code.select(left_out, code.long(0), code.long(1))
            for kind in lists:
                code.store(row, rows[kind] + counts[kind].get() * 8)
                counts[kind].set(counts[kind].get() + wanted[kind])
    for kind in lists:
        code.store(counts[kind].get(), starts[kind] + CHUNKS * 8)


def _sum_chunks(code: Code, frame: Frame, tokens: int, low: Value, high: Value) -> None:
    """Columns `low` to `high` of the sums: the chunks' sums, added in order."""
    pitch, kind = frame["columns"] * 4, vector(FLOAT, LANES // 2)
    for m in range(tokens):
        with code.loop(low, high, LANES // 2) as column:
            total = code.constant(kind, 0.0)
            for chunk in range(CHUNKS):
                total = total + code.load(kind, frame["part_sums"] + pitch * (chunk * tokens + m) + column * 4)
            code.store(total, frame["sums"] + pitch * m + column * 4)


def _write(code: Code, frame: Frame, tokens: int, part: Part, low: Value, high: Value) -> None:
    """Convert columns `low` to `high` of a part's sums, cut into runs of "span" every "stride", to y."""
    span, stride, dtype = frame["span"], frame["stride"], frame["dtype"]
    with code.loop((low - part.start) // stride, (high - part.start + (stride - 1)) // stride) as run:
        start = part.start + run * stride
        stop = code.minimum(start + span, part.start + run * stride + (part.width - run * span))
        begin = code.maximum(low, start)
        count = code.maximum(code.minimum(high, stop) - begin, code.long(0))
        column = part.first + run * span + (begin - start)
        for m in range(tokens):
            source = frame["sums"] + (frame["columns"] * m + begin) * 4
            target = frame["y"] + (frame["n"] * m + column) * element_width(code, dtype)
            write_floats(code, dtype, source, frame["bias"], column, target, count)


def _zero(code: Code, start: Value, count: Value) -> None:
    """Set `count` fp32 numbers to zero."""
    with code.loop(0, count) as i:
        code.store(code.constant(FLOAT, 0.0), start + i * 4)
