"""All kernels, from all operators."""

from __future__ import annotations

from importlib import import_module

from .launch import Kernel

OPS: tuple[str, ...] = ("two_four",)


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """The kernels of one operator, or of all. Raises KeyError for an unknown operator."""
    if op is not None and op not in OPS:
        raise KeyError(op)
    modules = [import_module(f".{name}.op", __package__) for name in ((op,) if op else OPS)]
    return tuple(kernel for module in modules for kernel in module.KERNELS)
