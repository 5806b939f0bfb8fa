"""All kernels, from all operators."""

from __future__ import annotations

from importlib import import_module

import torch

from .launch import Kernel, Shape

OPS: tuple[str, ...] = ("two_four",)


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """The kernels of one operator, or of all. Raises KeyError for an unknown operator."""
    if op is not None and op not in OPS:
        raise KeyError(op)
    modules = [import_module(f".{name}.op", __package__) for name in ((op,) if op else OPS)]
    return tuple(kernel for module in modules for kernel in module.KERNELS)


def steps(op: str, shape: Shape, dtype: torch.dtype, target: str) -> tuple[Kernel, ...]:
    """The kernels that the operator's heuristics launch, in order, for a linear of this shape; usually one.

    An operator module either chooses a single kernel (`choose`) or names its launches (`steps`). Raises LookupError
    where it would run a dense matmul.
    """
    module, known = import_module(f".{op}.op", __package__), {kernel.name: kernel for kernel in kernels(op)}
    names = module.steps(shape, dtype, target) if hasattr(module, "steps") else (module.choose(*shape, dtype, target),)
    return tuple(known[f"{op}.{name}"] for name in names)
