"""A small language for the CPU kernels: LLVM vector code written with Python's operators.

Python runs once, when a kernel is built, and leaves the instructions behind: Python loops and conditions are unrolled
and decided, `Code.loop` and `Code.when` remain at run time. Addresses are 64-bit integers. Vectors may be wider than
the machine's: LLVM splits them. Nothing is reassociated or contracted, so a formula means the same in every kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BIT = ir.IntType(1)
FLOAT, HALF, VOID, POINTER = ir.FloatType(), ir.HalfType(), ir.VoidType(), ir.PointerType()
Number = int | float


def vector(element: ir.Type, lanes: int) -> ir.Type:
    """The type of `lanes` elements; the element itself for one lane."""
    return ir.VectorType(element, lanes) if lanes > 1 else element


def size_of(kind: ir.Type) -> int:
    """Bytes of an integer, float or vector type."""
    if isinstance(kind, ir.VectorType):
        return kind.count * size_of(kind.element)
    if isinstance(kind, ir.IntType):
        return -(-kind.width // 8)
    return {FLOAT: 4, HALF: 2, POINTER: 8}[kind]


class Value:
    """One number or vector at run time. Operators act lane by lane; Python numbers adapt to the other side's type."""

    __slots__ = ("code", "raw")

    def __init__(self, code: Code, raw: ir.Value) -> None:
        self.code, self.raw = code, raw

    @property
    def type(self) -> ir.Type:
        return self.raw.type

    @property
    def element(self) -> ir.Type:
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    @property
    def lanes(self) -> int:
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    def __add__(self, other: Value | Number) -> Value:
        return self._binary("add", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self._binary("sub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self._binary("mul", other)

    def __and__(self, other: Value | Number) -> Value:
        return self._binary("and_", other)

    def __or__(self, other: Value | Number) -> Value:
        return self._binary("or_", other)

    def __lshift__(self, other: Value | Number) -> Value:
        return self._binary("shl", other)

    def __rshift__(self, other: Value | Number) -> Value:
        """Logical: zeros come in from the left."""
        return self._binary("lshr", other)

    def __floordiv__(self, other: Value | Number) -> Value:
        return self._binary("sdiv", other)

    def compare(self, operator: str, other: Value | Number) -> Value:
        """Signed or ordered comparison; NaN compares false."""
        builder, right = self.code.builder, self._match(other)
        compare = builder.fcmp_ordered if self.element == FLOAT else builder.icmp_signed
        return Value(self.code, compare(operator, self.raw, right))

    def convert(self, element: ir.Type) -> Value:
        """Unsigned widening or narrowing of integers, conversion between floats, or unsigned integers to floats."""
        builder, target = self.code.builder, vector(element, self.lanes)
        if isinstance(self.element, ir.IntType) and isinstance(element, ir.IntType):
            make = builder.zext if element.width > self.element.width else builder.trunc
        elif isinstance(self.element, ir.IntType):
            make = builder.uitofp
        else:
            make = builder.fpext if element == FLOAT else builder.fptrunc
        return Value(self.code, make(self.raw, target))

    def absolute(self) -> Value:
        return self.code.intrinsic("llvm.fabs", self.type, self, overload=self.type)

    def view(self, kind: ir.Type) -> Value:
        """The same bits as another type."""
        return Value(self.code, self.code.builder.bitcast(self.raw, kind))

    def pick(self, lanes: Sequence[int]) -> Value:
        """A vector of the lanes with these numbers; -1 leaves a lane undefined."""
        undefined = ir.Constant(self.type, ir.Undefined)
        mask = [lane if lane >= 0 else self.lanes for lane in lanes]  # a lane of the undefined vector
        shuffle = ir.Constant(ir.VectorType(INT, len(lanes)), mask)
        return Value(self.code, self.code.builder.shuffle_vector(self.raw, undefined, shuffle))

    def join(self, other: Value) -> Value:
        """The lanes of both, this one's first."""
        mask = ir.Constant(ir.VectorType(INT, 2 * self.lanes), list(range(2 * self.lanes)))
        return Value(self.code, self.code.builder.shuffle_vector(self.raw, other.raw, mask))

    def splat(self, lanes: int) -> Value:
        """A vector with this number in every lane."""
        if lanes == 1:
            return self
        undefined = ir.Constant(ir.VectorType(self.type, lanes), ir.Undefined)
        first = self.code.builder.insert_element(undefined, self.raw, ir.Constant(INT, 0))
        return Value(self.code, first).pick([0] * lanes)

    def sum(self) -> Value:
        """The sum of all lanes, always added in the same order: halves onto halves."""
        value = self
        while value.lanes > 1:
            half = value.lanes // 2
            low, high = value.pick(range(half)), value.pick(range(half, 2 * half))
            if half == 1:
                zero = ir.Constant(INT, 0)
                low, high = (Value(self.code, self.code.builder.extract_element(v.raw, zero)) for v in (low, high))
            value = low + high
        return value

    def _binary(self, name: str, other: Value | Number) -> Value:
        if self.element in (FLOAT, HALF):
            name = "f" + name
        return Value(self.code, getattr(self.code.builder, name)(self.raw, self._match(other)))

    def _match(self, other: Value | Number) -> ir.Value:
        return other.raw if isinstance(other, Value) else self.code.constant(self.type, other).raw


class Variable:
    """A place that loops may change; LLVM keeps it in a register."""

    def __init__(self, code: Code, start: Value) -> None:
        self.code = code
        with code.builder.goto_entry_block():
            self.place = code.builder.alloca(start.type)
        self.type = start.type
        self.set(start)

    def get(self) -> Value:
        return Value(self.code, self.code.builder.load(self.place, typ=self.type))

    def set(self, value: Value) -> None:
        self.code.builder.store(value.raw, self.place)


class Code:
    """Writes the instructions of one function."""

    def __init__(self, function: ir.Function) -> None:
        self.function, self.module = function, function.module
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.arguments = [Value(self, argument) for argument in function.args]

    def constant(self, kind: ir.Type, value: Any) -> Value:
        """A constant of a scalar type, or the same in every lane of a vector type (or one per lane, given a list)."""
        if isinstance(kind, ir.VectorType):
            values = value if isinstance(value, list) else [value] * kind.count
            return Value(self, ir.Constant(kind, [ir.Constant(kind.element, v) for v in values]))
        return Value(self, ir.Constant(kind, value))

    def long(self, value: int) -> Value:
        return self.constant(LONG, value)

    def load(self, kind: ir.Type, address: Value) -> Value:
        """Read `kind` at an address of any alignment."""
        return Value(self, self.builder.load(self._pointer(address), align=1, typ=kind))

    def store(self, value: Value, address: Value) -> None:
        """Write `value` at an address of any alignment."""
        self.builder.store(value.raw, self._pointer(address), align=1)

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    @contextmanager
    def loop(self, start: Value | int, stop: Value, step: int = 1) -> Iterator[Value]:
        """Repeat the body for the index from `start` below `stop`."""
        first = start if isinstance(start, Value) else self.long(start)
        builder, before = self.builder, self.builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(LONG)
        index.add_incoming(first.raw, before)
        builder.cbranch(builder.icmp_signed("<", index, stop.raw), body, after)
        builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming((Value(self, index) + step).raw, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body only if `condition` holds."""
        with self.builder.if_then(condition.raw):
            yield

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self.intrinsic("llvm.fma", a.type, a, b, c, overload=a.type)

    def done(self, status: Value | None = None) -> None:
        """End the function."""
        if status is None:
            self.builder.ret_void()
        else:
            self.builder.ret(status.raw)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller of two signed integers."""
        return self.select(a.compare("<", b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of two signed integers."""
        return self.select(a.compare(">", b), a, b)

    def intrinsic(self, name: str, result: ir.Type, *values: Value, overload: ir.Type | None = None) -> Value:
        """Call an LLVM intrinsic or an external function by name."""
        if overload is not None:
            name = f"{name}.{_mangled(overload)}"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [v.type for v in values]), name)
        return self.call(function, *values)

    def call(self, function: ir.Value, *values: Value) -> Value:
        return Value(self, self.builder.call(function, [v.raw for v in values]))

    def call_address(self, address: Value, result: ir.Type, *values: Value) -> Value:
        """Call the C function at a 64-bit address."""
        kind = ir.FunctionType(result, [v.type for v in values]).as_pointer()
        return self.call(self.builder.inttoptr(address.raw, kind), *values)

    def table(self, name: str, content: bytes) -> Value:
        """The address of constant bytes, one copy per module."""
        known = self.module.globals.get(name)
        if known is None:
            kind = ir.ArrayType(BYTE, len(content))
            known = ir.GlobalVariable(self.module, kind, name)
            known.initializer, known.global_constant = ir.Constant(kind, bytearray(content)), True
            known.linkage, known.align = "internal", 64
        return Value(self, self.builder.ptrtoint(known, LONG))

    def _pointer(self, address: Value) -> ir.Value:
        return self.builder.inttoptr(address.raw, POINTER)


def define(module: ir.Module, name: str, result: ir.Type, *arguments: ir.Type) -> Code:
    """Start a function; only `entry` can be called from outside."""
    function = ir.Function(module, ir.FunctionType(result, arguments), name)
    if name != "entry":
        function.linkage = "internal"
    return Code(function)


def _mangled(kind: ir.Type) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_mangled(kind.element)}"
    return {FLOAT: "f32", HALF: "f16"}.get(kind) or f"i{kind.width}"
