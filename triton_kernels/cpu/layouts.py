"""Each op's CPU layout, as `dispatch` takes it: from the stored tensors, back to them, and the linear over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.groups import Groups
from ..formats.groups_layer import LayerGroups
from ..formats.integers import Integers
from ..formats.two_four_int4 import TwoFourInt4
from ..weight import Layout, Linear, Weight
from . import group_int4, int4, matmul, select_forms, tied, two_four, two_four_int4
from .matmul import Rows


def _two_four(weight: Weight) -> two_four.TwoFour:
    """bf16 weights that were loaded into an fp32 model are stored as bf16 again: half the bytes, the same numbers."""
    values = weight.tensors["values"]
    narrow = values.bfloat16()
    exact = values.dtype == torch.float32 and bool((narrow.float() == values).all())
    return two_four.prepare(narrow if exact else values, weight.tensors["meta"])


def _restore_two_four(form: two_four.TwoFour, weight: Weight) -> Mapping[str, Tensor]:
    values, meta = two_four.restore(form)
    return {"values": values.to(weight.dtype), "meta": meta}


def _two_four_int4(weight: Weight) -> two_four_int4.TwoFourInt4:
    size = weight.settings["group_size"]
    return two_four_int4.prepare(weight.stored(TwoFourInt4), group_size=size, columns=weight.shape[1])


def _int4(weight: Weight) -> int4.Integers:
    bits, size = weight.settings["bits"], weight.settings["group_size"]
    return int4.prepare(weight.stored(Integers), bits=bits, group_size=size, columns=weight.shape[1])


def _group_int4(weight: Weight) -> group_int4.GroupInt4:
    if "row_start" in weight.tensors:
        return group_int4.prepare_layer(weight.stored(LayerGroups), weight.shape[1])
    return group_int4.prepare(weight.stored(Groups), weight.shape[1], segments=weight.settings["segments"])


def _restore_group_int4(form: group_int4.GroupInt4, weight: Weight) -> Mapping[str, Tensor]:
    if weight.settings["layer"]:
        return group_int4.restore_layer(form)._asdict()
    return group_int4.restore(form, segments=weight.settings["segments"])._asdict()


def _present(tensors: Mapping[str, Tensor | None]) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _k_major(rows: Callable[[Any], Rows]) -> tuple[Callable[[Any], Linear], Callable[[Any], int]]:
    """Of a layout that `matmul` computes with: the linear over a form, and its N."""
    return lambda form: matmul.linear(rows(form)), lambda form: rows(form).n


def _selecting(linear: Callable[[Tensor, Any, Tensor | None], Tensor]) -> Callable[[Any], Linear]:
    return lambda form: lambda x, bias: linear(x, form, bias)


_INTEGERS = Layout(_int4, lambda form, _: _present(int4.restore(form)._asdict()), *_k_major(int4.rows))
LAYOUTS: dict[str, Layout] = {
    "two_four": Layout(_two_four, _restore_two_four, *_k_major(two_four.rows)),
    "two_four_int4": Layout(
        _two_four_int4,
        lambda form, _: _present(two_four_int4.restore(form)._asdict()),
        *_k_major(two_four_int4.rows),
    ),
    "int4": _INTEGERS,
    "tied": _INTEGERS._replace(lookup=tied.lookup),
    "group_int4": Layout(_group_int4, _restore_group_int4, *_k_major(group_int4.rows)),
    "input_select": Layout(
        select_forms.prepare,
        select_forms.restore,
        _selecting(select_forms.linear),
        lambda form: form.weight.shape[1],
    ),
    "input_select_int4": Layout(
        select_forms.prepare_int4,
        select_forms.restore_int4,
        _selecting(select_forms.linear_int4),
        lambda form: form.n,
    ),
}
