"""What every kernel's program shares: its entry, its threads, reading activations and writing results.

A program is called with a list of 64-bit integers (sizes and addresses), named by its `fields`. It allocates scratch
memory and runs its steps one after the other, each once or on every thread of a team. Activations are converted to
fp32 once, before the steps; results are summed in fp32 and converted when a thread is done with its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from .code import BYTE, FLOAT, HALF, INT, LONG, POINTER, SHORT, VOID, Code, Value, define, vector
from .jit import Machine

POOL_FIELDS = ("threads", "omp_parallel", "omp_rank", "omp_size")
FP32, BF16, FP16 = 0, 1, 2
DTYPES = (FP32, BF16, FP16)
WIDTH = {FP32: 4, BF16: 2, FP16: 2}
LANES = 16
LINE = 64
ONCE, TEAM = "once", "team"


class Frame:
    """The program's named integers, as any of its functions sees them."""

    def __init__(self, code: Code, base: Value, names: tuple[str, ...]) -> None:
        self.code, self.base, self.names = code, base, names

    def __getitem__(self, name: str) -> Value:
        return self.code.load(LONG, self.base + 8 * self.names.index(name))

    def __setitem__(self, name: str, value: Value) -> None:
        self.code.store(value, self.base + 8 * self.names.index(name))


class Step(NamedTuple):
    """`run(code, frame, rank, size)`: this thread's share of the work of a team of `size`."""

    kind: str
    run: Callable[[Code, Frame, Value, Value], None]


def program(
    machine: Machine,
    fields: tuple[str, ...],
    locals_: tuple[str, ...],
    scratch: Callable[[Code, Frame], Value],
    steps: list[Step],
) -> tuple[str, int]:
    """LLVM assembly of a program and the number of integers it is called with.

    `scratch` gives the bytes of scratch memory, whose address the steps find in the frame as "scratch"; `locals_` are
    further names that steps may set. A step of kind ONCE may set "status" to end the program with it.
    """
    module = ir.Module("halfweight")
    module.triple = machine.triple
    given = (*fields, *POOL_FIELDS)
    names = (*given, "scratch", "status", *locals_)
    assert len(set(names)) == len(names), f"two fields have one name: {sorted(names)}"
    shares = []
    for number, step in enumerate(steps):
        code = define(module, f"step{number}", VOID, LONG, LONG, LONG)
        base, rank, size = code.arguments
        step.run(code, Frame(code, base, names), rank, size)
        code.done()
        shares.append(code.function)
    code = define(module, "entry", INT, POINTER)
    (arguments,) = code.arguments
    with code.builder.goto_entry_block():
        place = code.builder.alloca(ir.ArrayType(LONG, len(names)))
    base = Value(code, code.builder.ptrtoint(place, LONG))
    frame = Frame(code, base, names)
    source = Value(code, code.builder.ptrtoint(arguments.raw, LONG))
    for i in range(len(given)):
        code.store(code.load(LONG, source + 8 * i), base + 8 * i)
    memory = code.intrinsic("malloc", POINTER, scratch(code, frame) + LINE)
    start = Value(code, code.builder.ptrtoint(memory.raw, LONG))
    frame["status"] = code.select(start.compare("==", 0), code.long(1), code.long(0))
    frame["scratch"] = round_up(start, LINE)
    for step, share in zip(steps, shares, strict=True):
        with code.when(frame["status"].compare("==", 0)):
            if step.kind == ONCE:
                code.call(share, base, code.long(0), code.long(1))
            else:
                _on_team(code, frame, share)
    code.intrinsic("free", VOID, memory)
    code.done(frame["status"].convert(INT))
    return str(module), len(given)


def _on_team(code: Code, frame: Frame, share: ir.Function) -> None:
    """Call `share` on one thread, or on all of the OpenMP team that "threads" asks for."""
    region = define(code.module, f"{share.name}.region", VOID, POINTER)
    base = Value(region, region.builder.ptrtoint(region.arguments[0].raw, LONG))
    inner = Frame(region, base, frame.names)
    rank, size = (region.call_address(inner[name], INT).convert(LONG) for name in ("omp_rank", "omp_size"))
    region.call(share, base, rank, size)
    region.done()
    with code.builder.if_else(frame["threads"].compare(">", 1).raw) as (many, one):
        with many:
            pointer = Value(code, code.builder.inttoptr(frame.base.raw, POINTER))
            threads, flags = frame["threads"].convert(INT), code.constant(INT, 0)
            code.call_address(frame["omp_parallel"], VOID, Value(code, region.function), pointer, threads, flags)
        with one:
            code.call(share, frame.base, code.long(0), code.long(1))


def share_of(code: Code, count: Value, rank: Value, size: Value, unit: int = LANES) -> tuple[Value, Value]:
    """Thread `rank`'s contiguous part of `count` items, cut at multiples of `unit`."""
    blocks = (count + (unit - 1)) // unit
    start, stop = (code.minimum(blocks * r // size * unit, count) for r in (rank, rank + 1))
    return start, stop


def round_up(value: Value, unit: int) -> Value:
    """`value` raised to a multiple of `unit`, a power of two."""
    return (value + (unit - 1)) & -unit


def load_floats(code: Code, dtype: int, lanes: int, address: Value) -> Value:
    """`lanes` numbers of a dtype, as fp32."""
    if dtype == FP32:
        return code.load(vector(FLOAT, lanes), address)
    if dtype == FP16:
        return code.load(vector(HALF, lanes), address).convert(FLOAT)
    return (code.load(vector(SHORT, lanes), address).convert(INT) << 16).view(vector(FLOAT, lanes))


def store_floats(code: Code, dtype: int, value: Value, address: Value) -> None:
    """fp32 numbers, rounded to nearest even in a dtype."""
    if dtype == FP16:
        value = value.convert(HALF)
    elif dtype == BF16:
        bits = value.view(vector(INT, value.lanes))
        rounded = bits + ((bits >> 16) & 1) + 0x7FFF
        # rounding would carry a NaN's low bits into infinity or zero
        value = code.select(value.compare("==", value), rounded, bits | 0x400000) >> 16
        value = value.convert(SHORT)
    code.store(value, address)


def read_rows(code: Code, frame: Frame, target: Value) -> None:
    """Convert the activations x `[m, k]` to fp32 at `target`, each row as the kernel's `span` and `stride` say.

    A row is cut into runs of "span" numbers; each lies at a multiple of "stride", zeros between. Rows are `row_pitch`
    apart.
    """
    dtype, k, span, stride, padded = (frame[name] for name in ("dtype", "k", "span", "stride", "padded"))
    width = element_width(code, dtype)
    with code.loop(0, frame["m"]) as m, code.loop(0, padded // stride) as run:
        start = run * span
        count = code.maximum(code.minimum(k - start, span), code.long(0))
        place = target + (m * row_pitch(frame) + run * stride) * 4
        read_floats(code, dtype, frame["x"] + (m * k + start) * width, place, count)
        with code.loop(count, stride) as i:
            code.store(code.constant(FLOAT, 0.0), place + i * 4)


def element_width(code: Code, dtype: Value) -> Value:
    """Bytes of one number."""
    return code.select(dtype.compare("==", FP32), code.long(4), code.long(2))


def write_sums(code: Code, frame: Frame, sums: Value, start: Value, stop: Value) -> None:
    """Write y `[m, n]`, columns `start` to `stop`: the fp32 sums `[m, n]` plus the bias, in x's dtype."""
    dtype, n = frame["dtype"], frame["n"]
    width = element_width(code, dtype)
    with code.loop(0, frame["m"]) as m:
        place = m * n + start
        write_floats(code, dtype, sums + place * 4, frame["bias"], start, frame["y"] + place * width, stop - start)


def row_pitch(frame: Frame) -> Value:
    """Numbers from one token's fp32 activations to the next's: not a power of two, or all would share cache sets."""
    return frame["padded"] + 2 * LANES


def read_floats(code: Code, dtype: Value, source: Value, target: Value, count: Value) -> None:
    """Convert `count` numbers of a dtype to fp32."""
    function = code.module.globals.get("to_floats")
    if function is None:
        function = _to_floats(code.module)
    code.call(function, dtype, source, target, count)


def write_floats(
    code: Code, dtype: Value, source: Value, bias: Value, first: Value, target: Value, count: Value
) -> None:
    """Convert `count` fp32 numbers to a dtype; add the bias from its number `first` on unless its address is 0."""
    function = code.module.globals.get("from_floats")
    if function is None:
        function = _from_floats(code.module)
    code.call(function, dtype, source, bias, first, target, count)


def _to_floats(module: ir.Module) -> ir.Function:
    """`to_floats(dtype, source, target, count)`."""
    code = define(module, "to_floats", VOID, LONG, LONG, LONG, LONG)
    dtype, source, target, count = code.arguments
    for known in DTYPES:
        with code.when(dtype.compare("==", known)):
            whole = count & -LANES
            for start, stop, lanes in ((code.long(0), whole, LANES), (whole, count, 1)):
                with code.loop(start, stop, lanes) as i:
                    store_floats(code, FP32, load_floats(code, known, lanes, source + i * WIDTH[known]), target + i * 4)
    code.done()
    return code.function


def _from_floats(module: ir.Module) -> ir.Function:
    """`from_floats(dtype, source, bias, first, target, count)`."""
    code = define(module, "from_floats", VOID, *[LONG] * 6)
    dtype, source, bias, first, target, count = code.arguments
    for known in DTYPES:
        with code.when(dtype.compare("==", known)):
            whole = count & -LANES
            for start, stop, lanes in ((code.long(0), whole, LANES), (whole, count, 1)):
                with code.loop(start, stop, lanes) as i:
                    value = code.variable(load_floats(code, FP32, lanes, source + i * 4))
                    with code.when(bias.compare("!=", 0)):
                        added = load_floats(code, known, lanes, bias + (first + i) * WIDTH[known])
                        value.set(value.get() + added)
                    store_floats(code, known, value.get(), target + i * WIDTH[known])
    code.done()
    return code.function


def clear(code: Code, start: Value, count: Value) -> None:
    """Set `count` bytes to zero."""
    with code.loop(0, count) as i:
        code.store(code.constant(BYTE, 0), start + i)
