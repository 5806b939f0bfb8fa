"""Linears on a GPU: each op's layout, as `dispatch` takes it, and what its kernels allow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import trust
from .formats import FormatError
from .formats.groups import Groups
from .formats.groups_layer import LayerGroups
from .formats.input_select import InputSelection, every_input
from .formats.integers import Integers
from .formats.two_four_int4 import TwoFourInt4
from .group_int4 import layout as group_int4
from .input_select import layout as input_select
from .input_select_int4 import layout as input_select_int4
from .int4 import layout as int4
from .launch import EVERY_GPU, NVIDIA, device_target
from .two_four import layout as two_four
from .two_four_int4 import layout as two_four_int4
from .weight import Prepared, Weight


class Form(NamedTuple):
    """`prepare(weight)` brings stored tensors into the op's GPU order, a named tuple; `restore` (given the weight
    without its tensors) inverts it. FormatError where the order cannot hold the weight. `arguments(form)` are those of
    the operator, between x and the bias; `settings` of a weight are what `can_run` of the op looks at. `expands`: many
    tokens multiply with the weight written out, for which the op's `linear` takes `scratch`."""

    prepare: Callable[[Weight], Any]
    restore: Callable[[Any, Weight], Mapping[str, Tensor | None]]
    arguments: Callable[[Any], tuple[Any, ...]] = tuple
    settings: tuple[str, ...] = ("group_size",)
    expands: bool = True


def _integers(weight: Weight) -> int4.Prepared:
    bits, size = weight.settings["bits"], weight.settings["group_size"]
    return int4.prepare(weight.stored(Integers), bits=bits, group_size=size, columns=weight.shape[1])


def _two_four_int4(weight: Weight) -> two_four_int4.Prepared:
    packed = weight.stored(TwoFourInt4)
    return two_four_int4.prepare(packed, group_size=weight.settings["group_size"], k=weight.shape[1])


def _groups(weight: Weight) -> group_int4.Prepared:
    if weight.settings["layer"]:
        return group_int4.prepare_layer(weight.stored(LayerGroups), weight.shape[1])
    return group_int4.prepare(weight.stored(Groups), weight.shape[1], segments=weight.settings["segments"])


def _restore_groups(form: group_int4.Prepared, weight: Weight) -> Mapping[str, Tensor | None]:
    if weight.settings["layer"]:
        return group_int4.restore_layer(form)._asdict()
    return group_int4.restore(form, segments=weight.settings["segments"])._asdict()


def _selection(weight: Weight) -> InputSelection:
    return weight.selection or every_input(weight.device)


def _stored_selection(selection: InputSelection, weight: Weight) -> Mapping[str, Tensor | None]:
    return selection._asdict() if weight.settings["selects"] else {}


def _restore_input_select(form: input_select.Prepared, weight: Weight) -> Mapping[str, Tensor | None]:
    dense, selection = input_select.restore(form)
    return {"weight_t": dense, **_stored_selection(selection, weight)}


def _input_select_int4(weight: Weight) -> input_select_int4.Prepared:
    packed = [weight.stored(Groups if "index" in weight.tensors else Integers)]
    size = weight.settings["group_size"]
    return input_select_int4.prepare(packed, _selection(weight), weight.shape[:1], group_size=size)


def _restore_input_select_int4(form: input_select_int4.Prepared, weight: Weight) -> Mapping[str, Tensor | None]:
    (packed,), selection = input_select_int4.restore(form, symmetric=bool(weight.settings["symmetric"]))
    return {**packed._asdict(), **_stored_selection(selection, weight)}


def _flat(form: input_select_int4.Prepared) -> tuple[Any, ...]:
    """The operator's order of the nested tuple."""
    weight = (form.codes, form.scales, form.zeros, form.entries, form.tiles)
    return (*weight, form.group_size, form.stored_group_size, form.segments, form.kept, *form.select)


_INTEGERS = Form(_integers, lambda form, weight: int4.restore(form, group_size=weight.settings["group_size"])._asdict())
FORMS: dict[str, Form] = {
    "two_four": Form(
        lambda weight: two_four.prepare(weight.tensors["values"], weight.tensors["meta"]),
        lambda form, _: dict(zip(("values", "meta"), two_four.restore(form), strict=True)),
    ),
    "two_four_int4": Form(
        _two_four_int4,
        lambda form, weight: two_four_int4.restore(form, group_size=weight.settings["group_size"])._asdict(),
    ),
    "int4": _INTEGERS,
    "tied": _INTEGERS,
    "group_int4": Form(_groups, _restore_groups),
    "input_select": Form(
        lambda weight: input_select.prepare(weight.tensors["weight_t"], _selection(weight)),
        _restore_input_select,
        expands=False,
    ),
    "input_select_int4": Form(_input_select_int4, _restore_input_select_int4, _flat, ("group_size", "bits")),
}
# Launches of a linear leave sums or an expanded weight for the next; another thread's must not come between.
_LAUNCHING = threading.Lock()
# Room for expanded weights, shared by all linears of a device, dtype and stream as long as one of them lives.
_ROOMS: WeakValueDictionary[tuple[torch.device, torch.dtype, int], Tensor] = WeakValueDictionary()
_LINEAR_OF = {"tied": "int4"}  # the op whose linear a table's head is


def can_run(
    op: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, settings: Mapping[str, int]
) -> tuple[bool, str]:
    """Whether the kernels of `op` take this weight on this GPU, or why not."""
    if op not in FORMS:
        return False, f"{op} has no GPU kernels"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    target = device_target(device)
    if target not in EVERY_GPU:
        return False, f"no kernels are built for {target}"
    sizes = {name: settings[name] for name in FORMS[op].settings if name in settings}
    possible, reason = _module(op).can_run(shape, dtype, target, **sizes)
    return trust.may_run(f"{op}.triton", device) if possible else (possible, reason)


def kernels_in_use(op: str, device: torch.device) -> str:
    """In words: the op's kernels, and why the one with inline assembly is not among them."""
    name = _with_assembly(op)
    if name is None or device_target(device) not in NVIDIA:
        return f"{op} kernels"
    allowed, reason = trust.may_run(name, device, inline_asm=True)
    return f"{op} kernels" if allowed else f"{op} kernels without {name}: {reason}"


def assembly_for(weight: Weight, dtype: torch.dtype, tokens: int) -> str | None:
    """The kernel with inline assembly that `tokens` tokens would run, once it is trusted; None where none would."""
    name, target = _with_assembly(weight.op), device_target(weight.device)
    if name is None:
        return None
    chosen = _module(weight.op).choose(tokens, *weight.shape, dtype, target, True)
    return name if name.endswith(f".{chosen}") else None


def prepare(weight: Weight, dtype: torch.dtype) -> Prepared:
    """Bring the weight into its GPU order for inputs of `dtype`; FormatError where that is impossible."""
    if weight.dtype != dtype and any(tensor.is_floating_point() for tensor in weight.tensors.values()):
        name = "2:4" if weight.op == "two_four" else weight.op
        raise FormatError(f"the {name} kernels want inputs of the weight's {_name(weight.dtype)}, not {_name(dtype)}")
    module, kind = _module(weight.op), FORMS[weight.op]
    form, empty = kind.prepare(weight), replace(weight, tensors={})
    module.register()
    operator = getattr(torch.ops.halfweight, f"{_linear_op(weight.op)}_gpu")
    stream, room = _stream(weight.device), None
    if kind.expands:
        room = _room(weight.device, dtype, stream, module.scratch_numbers(form))

    def run(x: Tensor, bias: Tensor | None, **masked: bool) -> Tensor:
        if x.dtype != dtype:
            raise ValueError(f"this linear was prepared for {_name(dtype)} inputs, got {_name(x.dtype)}")
        if torch.compiler.is_compiling():
            return operator(x, *kind.arguments(form), bias, **masked)
        # On another stream (so while a graph is captured) the allocator finds room that nobody else writes to.
        scratch = {} if room is None or _stream(x.device) != stream else {"scratch": room}
        with torch.cuda.device_of(x), _LAUNCHING:  # Triton launches on the current device
            return module.linear(x, form, bias, **scratch, **masked)

    def restore() -> Mapping[str, Tensor]:
        return {name: tensor for name, tensor in kind.restore(form, empty).items() if tensor is not None}

    rows = _lookup(form) if weight.op == "tied" else None
    run_all = None if weight.selection is None else partial(run, masked=False)
    return Prepared("triton", kernels_in_use(weight.op, weight.device), run, restore, rows, run_all)


def _room(device: torch.device, dtype: torch.dtype, stream: int, numbers: int) -> Tensor:
    """At least `numbers` elements, to be kept by those who asked."""
    key = (device, dtype, stream)
    room = _ROOMS.get(key)
    if room is None or room.numel() < numbers:
        room = torch.empty(numbers, dtype=dtype, device=device)
        _ROOMS[key] = room
    return room


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _lookup(form: int4.Prepared) -> Callable[[Tensor, torch.dtype], Tensor]:
    """`rows(ids, dtype)` of a prepared table."""
    from .tied import op as tied

    tied.register()

    def rows(ids: Tensor, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.halfweight.tied_lookup_gpu(ids, *form, dtype)
            return found
        with torch.cuda.device_of(ids):
            return tied.lookup(ids, form, dtype)

    return rows


def _linear_op(op: str) -> str:
    return _LINEAR_OF.get(op, op)


def _module(op: str) -> Any:
    """What computes the op's linear."""
    return import_module(f".{_linear_op(op)}.op", __package__)


def _with_assembly(op: str) -> str | None:
    """The op's kernel that waits for warmup's check."""
    return next((kernel.name for kernel in _module(op).KERNELS if kernel.inline_asm), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
