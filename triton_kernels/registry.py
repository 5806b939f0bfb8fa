"""All kernels, from all operators."""

from __future__ import annotations

from importlib import import_module

import torch

from .launch import Kernel, Launch, Shape

OPS: tuple[str, ...] = (
    "two_four",
    "two_four_int4",
    "int4",
    "group_int4",
    "input_select",
    "input_select_int4",
    "tied",
)


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """The kernels of one operator, or of all. Raises KeyError for an unknown operator."""
    if op is not None and op not in OPS:
        raise KeyError(op)
    modules = [import_module(f".{name}.op", __package__) for name in ((op,) if op else OPS)]
    return tuple(kernel for module in modules for kernel in module.KERNELS)


def steps(op: str, shape: Shape, dtype: torch.dtype, target: str) -> list[tuple[Kernel, Launch]]:
    """The launches that the operator makes for a linear of this shape, in order, on meta tensors; usually one.

    An operator module either chooses a single kernel (`choose`) or lists its launches (`steps`). Raises LookupError
    where it would run a dense matmul.
    """
    module, known = import_module(f".{op}.op", __package__), {kernel.name: kernel for kernel in kernels()}
    if hasattr(module, "steps"):
        return [(known[name], launch) for name, launch in module.steps(shape, dtype, target)]
    kernel = known[f"{op}.{module.choose(*shape, dtype, target)}"]
    return [(kernel, kernel.example(shape, dtype, target))]
