"""Count the memory traffic of a launch on the interpreter, exactly, and stop at the first access out of bounds.

DRAM bytes of a cold launch are the distinct 32-byte sectors each argument is touched in; bytes through the L2 cache are
those sectors counted once per program that asks for them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
from torch import Tensor
from triton.runtime import interpreter

from ..launch import Launch
from .interpreter import interpret

SECTOR = 32
_MACHINERY = (str(Path(triton.__file__).parent), __file__)  # whose frames are no kernel's
_HOOKED = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


class OutOfBounds(IndexError):
    """A program touched memory outside every tensor argument."""


@dataclass
class Traffic:
    """What a launch did to one tensor argument of `size` bytes. `requested`: bytes asked for, by all lanes."""

    size: int
    requested: int = 0
    sectors: set[int] = field(default_factory=set)
    l2_bytes: int = 0

    @property
    def dram_bytes(self) -> int:
        """Bytes of the distinct sectors touched; of a short tensor, no more than it has."""
        return min(self.size, SECTOR * len(self.sectors))


@dataclass
class Metering:
    """Traffic per tensor argument, and bytes (sectors) per program."""

    arguments: dict[str, Traffic]
    programs: dict[tuple[int, ...], int]
    atomics: int = 0

    @property
    def dram_bytes(self) -> int:
        return sum(traffic.dram_bytes for traffic in self.arguments.values())

    @property
    def l2_bytes(self) -> int:
        return sum(traffic.l2_bytes for traffic in self.arguments.values())

    @property
    def imbalance(self) -> float:
        """Bytes of the busiest program over the mean."""
        loads = list(self.programs.values())
        return max(loads) / (sum(loads) / len(loads)) if loads else 1.0


def meter(jit: Any, launch: Launch) -> Metering:
    """Interpret `launch` and count its traffic; tensor arguments must be contiguous.

    A tensor that is passed twice counts under its first name. Raises triton's InterpreterError around an OutOfBounds
    that names program and source line.
    """
    ranges = {
        name: (value.data_ptr(), value.data_ptr() + value.numel() * value.element_size())
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    }
    result = Metering({name: Traffic(stop - start) for name, (start, stop) in ranges.items()}, {})
    with _hooks(result, ranges):
        interpret(jit, launch)
    return result


@contextlib.contextmanager
def _hooks(result: Metering, ranges: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Count in the interpreter's builder; arguments must be contiguous for their range to be right."""
    builder = interpreter.interpreter_builder
    seen: dict[tuple[tuple[int, ...], str], set[int]] = {}

    def touch(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data, dtype=np.uint64).ravel().astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data)).ravel()]
        size = max(1, interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
        program = tuple(int(index) for index in builder.grid_idx)
        known = np.zeros(addresses.size, bool)
        for name, (start, stop) in ranges.items():
            inside = (addresses >= start) & (addresses + size <= stop) & ~known
            if inside.any():
                known |= inside
                _count(result, seen, program, name, addresses[inside], size)
        if not known.all():
            raise OutOfBounds(f"{int((~known).sum())} lanes out of bounds, program {program}, {_kernel_line()}")

    def hooked(name: str) -> Any:
        original = getattr(type(builder), name)

        def call(pointers: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "create_atomic_rmw":  # (operation, pointers, value, mask, ...)
                result.atomics += 1
                touch(args[0], args[2])
            elif name == "create_atomic_cas":
                result.atomics += 1
                touch(pointers, None)
            elif name == "create_masked_load":
                touch(pointers, args[0])
            else:
                touch(pointers, args[1])
            return original(builder, pointers, *args, **kwargs)

        return call

    for name in _HOOKED:
        setattr(builder, name, hooked(name))
    try:
        yield
    finally:
        for name in _HOOKED:
            delattr(builder, name)


def _count(
    result: Metering,
    seen: dict[tuple[tuple[int, ...], str], set[int]],
    program: tuple[int, ...],
    name: str,
    addresses: npt.NDArray[np.int64],
    size: int,
) -> None:
    traffic = result.arguments[name]
    traffic.requested += addresses.size * size
    sectors = set(np.unique(addresses // SECTOR).tolist())
    traffic.sectors |= sectors
    before = seen.setdefault((program, name), set())
    fresh = SECTOR * len(sectors - before)
    before |= sectors
    traffic.l2_bytes += fresh
    result.programs[program] = result.programs.get(program, 0) + fresh


def _kernel_line() -> str:
    """File and line of the kernel statement that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def guarded(tensor: Tensor, zone: int = 4096) -> Tensor:
    """A contiguous copy of `tensor` with `zone` bytes of no man's land on both sides, 16-byte aligned.

    Allocators put tensors side by side; with the zones a small overrun cannot land inside another argument.
    """
    pad = zone // tensor.element_size()
    room = tensor.new_zeros(tensor.numel() + 2 * pad)
    inner = room[pad : pad + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)
