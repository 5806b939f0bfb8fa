"""Which implementation runs a compressed linear, and why: Triton kernels on a GPU, compiled vector code on a CPU, or
the reference, which expands the weight and calls the dense matmul.

`HALFWEIGHT_BACKEND=reference` forces the reference everywhere. Nothing falls back silently: every choice carries its
reason, which `halfweight inspect --device` and `explain` show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import trust
from .formats import FormatError
from .formats.bits import from_bits
from .formats.input_select import InputSelection
from .library import register
from .weight import Layout, Linear, Lookup, Prepared, Weight

SWITCH = "HALFWEIGHT_BACKEND"
# Relative RMS error a kernel may show against the reference in fp32 math, by the dtype of its inputs and outputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def can_run(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    settings: Mapping[str, int] = MappingProxyType({}),
) -> tuple[bool, str]:
    """Whether kernels of `op` take a weight of `shape` `(N, K)` and inputs of `dtype` on `device`; else why not.

    `settings` are those of the `Weight`.
    """
    forced = os.environ.get(SWITCH, "")
    if forced not in ("", "auto", "reference"):
        raise ValueError(f"{SWITCH}={forced!r} is unknown; use auto or reference")
    if forced == "reference":
        return False, f"{SWITCH}=reference"
    match backend_of(device):
        case "cpu":
            return _cpu_can_run(op, dtype, device)
        case "triton":
            return _gpu().can_run(op, shape, dtype, device, settings)
    return False, f"no kernels for {device.type} devices"


def backend_of(device: torch.device) -> str | None:
    """Whose kernels serve a device: `cpu`, `triton`, or None."""
    return {"cpu": "cpu", "cuda": "triton"}.get(device.type)


def expect(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    settings: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, str]:
    """`(backend, reason)` that `prepare` would choose for a weight of `shape` on `device`."""
    possible, reason = can_run(op, shape, dtype, device, settings)
    if not possible:
        return "reference", reason
    if backend_of(device) == "triton":
        return "triton", _gpu().kernels_in_use(op, device)
    return "cpu", f"{op} kernels"


def prepare(weight: Weight, dtype: torch.dtype) -> Prepared:
    """Choose the implementation for inputs of `dtype` on the weight's device and bring the weight into its layout."""
    possible, reason = can_run(weight.op, weight.shape, dtype, weight.device, weight.settings)
    if not possible:
        return reference(weight, reason)
    if backend_of(weight.device) == "triton":
        try:
            return _gpu().prepare(weight, dtype)
        except FormatError as error:
            return reference(weight, str(error))
    layout = _cpu_layout(weight.op)
    assert layout is not None  # can_run has looked
    return _prepared(weight, layout)


def reference(weight: Weight, reason: str) -> Prepared:
    """The reference implementation: expand the weight and multiply, on every call."""

    def rows(ids: Tensor, dtype: torch.dtype) -> Tensor:
        flat = ids.reshape(-1)
        found = {name: tensor.index_select(0, flat) for name, tensor in weight.tensors.items()}
        return weight.expand(found, dtype).reshape(*ids.shape, weight.shape[1])

    run_all = None if weight.selection is None else partial(weight.linear, masked=False)
    return Prepared("reference", reason, weight.linear, lambda: weight.tensors, rows, run_all)


def verify(weight: Weight, dtype: torch.dtype, tokens: int, seed: int = 0) -> tuple[bool, str]:
    """Run the chosen implementation on random inputs `[tokens, K]` and compare it with the reference in fp32.

    The outcome is recorded: after a mismatch, or when it does not run at all, the kernel is off for this device and
    process, and this returns why. A kernel with inline assembly is checked after those without, for itself.
    """
    chosen = prepare(weight, dtype)
    if chosen.backend == "reference":
        return True, chosen.reason
    device, name = weight.device, f"{weight.op}.{chosen.backend}"
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(tokens, weight.shape[1], generator=generator).to(device)
    x = near_threshold(random, weight.selection).to(dtype)
    want = weight.linear(x.float(), None)

    def check(kernel: str) -> None:
        try:
            error = _relative_rms(chosen(x, None), want)
            if weight.op == "tied" and chosen.rows is not None:
                ids = torch.arange(tokens, device=device) * 17 % weight.shape[0]
                error = max(error, _relative_rms(chosen.rows(ids, dtype), weight.dense(torch.float32)[ids]))
        except Exception as failure:  # of whatever a compiler or driver raises
            first_line = str(failure).strip().partition("\n")[0]
            trust.refuse(kernel, device, f"{kernel} does not run on {device}: {first_line}")
        else:
            trust.record(kernel, device, error, TOLERANCE[dtype], tokens)

    assembly = _gpu().assembly_for(weight, dtype, tokens) if chosen.backend == "triton" else None
    if assembly is None:
        check(name)
        return trust.may_run(name, device)
    with trust.assume(assembly, False):
        check(name)
    if trust.may_run(name, device)[0] and trust.may_run(assembly, device)[0]:
        with trust.assume(assembly, True):
            check(assembly)
    return trust.may_run(name, device)


def near_threshold(x: Tensor, selection: InputSelection | None) -> Tensor:
    """`x` `[tokens, K]` at a scale where the first part reads about half of it, if inputs are selected at all."""
    if selection is None or selection.thresholds is None:  # each token reads its count, whatever the scale
        return x
    score = x.abs() if selection.norms is None else x.abs() * from_bits(selection.norms)[0]
    scale = float(from_bits(selection.thresholds)[0] / score.median())
    return x * scale if 0 < scale < math.inf else x


def _relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm().clamp_min(1e-30))


def _prepared(weight: Weight, layout: Layout) -> Prepared:
    form = layout.prepare(weight)
    empty = replace(weight, tensors={})  # the stored tensors may go now
    operator = operator_of(weight.op, type(form), layout)

    def runs(form: Any) -> Linear:
        linear = layout.linear(form)

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            # The operator exists for tracing; calling through it costs more than a small GEMV saves.
            if torch.compiler.is_compiling():
                return operator(x, *form, bias)
            return linear(x, bias)

        return run

    run_all = None
    if weight.selection is not None:
        lowest = torch.full((len(form.parts),), -1.0)  # every |x| is above that
        run_all = runs(form._replace(thresholds=lowest, counts=None, V=None, U=None))
    rows = None if layout.lookup is None else _rows(weight.op, form, layout.lookup)
    return Prepared("cpu", f"{weight.op} kernels", runs(form), lambda: layout.restore(form, empty), rows, run_all)


def _rows(op: str, form: Any, lookup: Lookup) -> Callable[[Tensor, torch.dtype], Tensor]:
    operator = lookup_operator_of(op, type(form), lookup)

    def rows(ids: Tensor, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = operator(ids, *form, dtype)
            return result
        return lookup(ids, form, dtype)

    return rows


def operator_of(op: str, form: type, layout: Layout) -> Any:
    """`torch.ops.halfweight.<op>_cpu(x, <fields of form>, bias)`, registered on first use."""
    name = f"{op}_cpu"
    fields: Any = form

    def run(x: Tensor, *rest: Any) -> Tensor:
        return layout.linear(fields(*rest[:-1]))(x, rest[-1])

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], layout.out_features(fields(*rest[:-1]))))

    register(f"{name}(Tensor x, {_schema(form)}, Tensor? bias) -> Tensor", {"CPU": run}, fake)
    return getattr(torch.ops.halfweight, name)


def lookup_operator_of(op: str, form: type, lookup: Lookup) -> Any:
    """`torch.ops.halfweight.<op>_lookup_cpu(ids, <fields of form>, dtype)`, registered on first use."""
    name = f"{op}_lookup_cpu"
    fields: Any = form

    def run(ids: Tensor, *rest: Any) -> Tensor:
        return lookup(ids, fields(*rest[:-1]), rest[-1])

    def fake(ids: Tensor, *rest: Any) -> Tensor:
        return ids.new_empty((*ids.shape, fields(*rest[:-1]).columns), dtype=rest[-1])

    register(f"{name}(Tensor ids, {_schema(form)}, ScalarType dtype) -> Tensor", {"CPU": run}, fake)
    return getattr(torch.ops.halfweight, name)


def _schema(form: type) -> str:
    """The fields of a layout's named tuple, as arguments of an operator."""
    kinds: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int"}
    return ", ".join(f"{kinds[kind]} {field}" for field, kind in get_type_hints(form).items())


def _gpu() -> Any:
    return import_module(".gpu", __package__)


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
