"""Interpret `@triton.jit` kernels that stay compilable in the same process.

`@triton.jit` decides when it decorates: with interpretation off it makes a JITFunction, which the compiler needs and
the interpreter cannot call, and Triton's own library (`tl.sum`, ...) consists of them too. So while a kernel is
interpreted, every JITFunction that it can reach is swapped for an interpreted twin, and all of it is put back after.

The interpreter's own limits (Triton 3.5 to 3.9): bf16 arithmetic, bf16 `tl.dot` and casts to bf16 are silently wrong
(kernels convert to fp32 right after a load and tests round on the host), and inline assembly is unknown to it (`ptx.py`
emulates it).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ..launch import Launch
from .ptx import emulated_inline_asm

# By id: hashing a JITFunction parses its dependencies, which are swapped out at that moment. The values keep their keys
# alive.
_twins: dict[int, tuple[JITFunction, InterpretedFunction]] = {}


def interpret(jit: JITFunction, launch: Launch) -> None:
    """Run one launch of `jit` on CPU tensors, program by program; outputs are written into the launch's tensors.

    Inline PTX is emulated. Raises triton's InterpreterError around whatever went wrong in the kernel.
    """
    with interpreted(jit) as function, emulated_inline_asm():
        function[launch.grid](**launch.arguments, **launch.constants)


@contextlib.contextmanager
def interpreted(jit: JITFunction) -> Iterator[InterpretedFunction]:
    """Swap `jit` and all it can reach for interpreted twins; yields the twin of `jit`."""
    modules = [m for n, m in sys.modules.items() if m is not None and f"{n}.".startswith("triton.language.")]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__.startswith("triton.language")
    }
    before = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    swapped: dict[int, tuple[dict[str, Any], dict[str, JITFunction]]] = {}

    def swap(names: dict[str, Any]) -> None:
        """Swap the JITFunctions among a module's globals, and those that their own modules reach."""
        if id(names) in swapped:
            return
        found = {name: value for name, value in names.items() if isinstance(value, JITFunction)}
        swapped[id(names)] = (names, found)
        for name, value in found.items():
            swap(value.fn.__globals__)
            names[name] = _twin(value)

    interpreting = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = True
        for module in modules:
            swap(vars(module))
        swap(jit.fn.__globals__)
        yield _twin(jit)
    finally:
        triton.knobs.runtime.interpret = interpreting
        for names, found in swapped.values():
            names.update(found)
        for owner, names in before:
            _restore(owner, names)


def _twin(jit: JITFunction) -> InterpretedFunction:
    """The interpreted twin of `jit`, always the same one."""
    if id(jit) not in _twins:
        _twins[id(jit)] = (jit, InterpretedFunction(jit.fn))
    return _twins[id(jit)][1]


def _restore(owner: Any, names: dict[str, Any]) -> None:
    """Undo the interpreter's patches of one module or class of triton.language."""
    for name in set(vars(owner)) - set(names) if inspect.isclass(owner) else ():
        with contextlib.suppress(AttributeError, TypeError):
            delattr(owner, name)
    for name, value in names.items():
        if vars(owner).get(name) is not value:
            with contextlib.suppress(AttributeError, TypeError):
                setattr(owner, name, value)
