"""Which implementation runs a compressed linear, and why: Triton kernels on a GPU, compiled vector code on a CPU, or
the reference, which expands the weight and calls the dense matmul.

`HALFWEIGHT_BACKEND=reference` forces the reference everywhere. Nothing falls back silently: every choice carries its
reason, which `halfweight inspect --device` and `explain` show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional as F

from . import trust
from .library import register

SWITCH = "HALFWEIGHT_BACKEND"
# Relative RMS error a kernel may show against the reference in fp32 math, by the dtype of its inputs and outputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Weight:
    """A compressed weight `[N, K]` in its stored form: `op` names the folder of kernels for it, `settings` its numbers.

    `dtype` is the model's.
    """

    op: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    settings: Mapping[str, int]
    dtype: torch.dtype
    expand: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight `[N, K]` in `dtype`: what every implementation has to reproduce."""
        return self.expand(self.tensors, dtype)


@dataclass(frozen=True)
class Prepared:
    """A weight in the layout of one implementation. `backend` is `triton`, `cpu` or `reference`; `reason` says why."""

    backend: str
    reason: str
    run: Callable[[Tensor, Tensor | None], Tensor]
    restore: Callable[[], Mapping[str, Tensor]]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`."""
        return self.run(x, bias)


class Layout(NamedTuple):
    """How one backend stores an op's weights: `prepare(weight)` makes a named tuple of tensors and integers, `restore`
    inverts it (given the weight without its tensors), `linear` computes with it, `out_features` reads N off it."""

    prepare: Callable[[Weight], Any]
    restore: Callable[[Any, Weight], Mapping[str, Tensor]]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor]
    out_features: Callable[[Any], int]


def can_run(op: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether kernels of `op` take a weight of `shape` `(N, K)` and inputs of `dtype` on `device`; else why not."""
    forced = os.environ.get(SWITCH, "")
    if forced not in ("", "auto", "reference"):
        raise ValueError(f"{SWITCH}={forced!r} is unknown; use auto or reference")
    if forced == "reference":
        return False, f"{SWITCH}=reference"
    if device.type == "cpu":
        return _cpu_can_run(op, dtype, device)
    return False, f"no kernels for {device.type} devices"


def expect(op: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """`(backend, reason)` that `prepare` would choose for a weight of `shape` on `device`."""
    possible, reason = can_run(op, shape, dtype, device)
    if not possible:
        return "reference", reason
    return ("cpu" if device.type == "cpu" else "triton"), f"{op} kernels"


def prepare(weight: Weight, dtype: torch.dtype) -> Prepared:
    """Choose the implementation for inputs of `dtype` on the weight's device and bring the weight into its layout."""
    possible, reason = can_run(weight.op, weight.shape, dtype, weight.device)
    if not possible:
        return reference(weight, reason)
    layout = _cpu_layout(weight.op)
    assert layout is not None  # can_run has looked
    return _prepared(weight, layout, "cpu")


def reference(weight: Weight, reason: str) -> Prepared:
    """The reference implementation: expand the weight and multiply, on every call."""

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.dense(x.dtype), bias)

    return Prepared("reference", reason, run, lambda: weight.tensors)


def verify(weight: Weight, dtype: torch.dtype, tokens: int, seed: int = 0) -> tuple[bool, str]:
    """Run the chosen implementation on random inputs `[tokens, K]` and compare it with the reference in fp32.

    The outcome is recorded: after a mismatch the kernel is off for this device and process, and this returns why.
    """
    chosen = prepare(weight, dtype)
    if chosen.backend == "reference":
        return True, chosen.reason
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.device, dtype)
    want = x.float() @ weight.dense(torch.float32).T
    error = float((chosen(x, None).float() - want).norm() / want.norm().clamp_min(1e-30))
    name = f"{weight.op}.{chosen.backend}"
    trust.record(name, weight.device, error, TOLERANCE[dtype])
    return trust.may_run(name, weight.device)


def _prepared(weight: Weight, layout: Layout, backend: str) -> Prepared:
    form = layout.prepare(weight)
    empty = replace(weight, tensors={})  # the stored tensors may go now
    operator = operator_of(weight.op, backend, type(form), layout)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        # The operator exists for tracing; calling through it costs more than a small GEMV saves.
        if torch.compiler.is_compiling():
            return operator(x, *form, bias)
        return layout.linear(x, form, bias)

    return Prepared(backend, f"{weight.op} kernels", run, lambda: layout.restore(form, empty))


def operator_of(op: str, backend: str, form: type, layout: Layout) -> Any:
    """`torch.ops.halfweight.<op>_<backend>(x, <fields of form>, bias)`, registered on first use."""
    name = f"{op}_{backend}"
    fields: Any = form
    kinds: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int"}
    arguments = ", ".join(f"{kinds[kind]} {field}" for field, kind in get_type_hints(form).items())

    def run(x: Tensor, *rest: Any) -> Tensor:
        return layout.linear(x, fields(*rest[:-1]), rest[-1])

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], layout.out_features(fields(*rest[:-1]))))

    key = {"cpu": "CPU", "triton": "CUDA"}[backend]
    register(f"{name}(Tensor x, {arguments}, Tensor? bias) -> Tensor", {key: run}, fake)
    return getattr(torch.ops.halfweight, name)


def _cpu_layout(op: str) -> Layout | None:
    return import_module(".cpu.layouts", __package__).LAYOUTS.get(op)


def _cpu_can_run(op: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    try:
        possible, reason = import_module(".cpu.jit", __package__).available()
    except ImportError as missing:
        possible, reason = False, f"{missing.name} is not installed (pip install 'halfweight[cpu]')"
    if not possible:
        return False, reason
    if _cpu_layout(op) is None:
        return False, f"{op} has no CPU kernels"
    if dtype not in TOLERANCE:
        return False, f"the CPU kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return trust.may_run(f"{op}.cpu", device)
