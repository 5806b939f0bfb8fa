"""Input-major weights as `dispatch` holds them: flat tuples, made from the stored tensors and turned back into them.

Without a selection the threshold is 0, which reads every input that is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import groups, integers
from ..formats.bits import to_bits
from ..formats.input_select import InputSelection, every_input
from ..weight import Weight
from . import group_int4, input_select, input_select_int4, int4, selected
from .group_int4 import GroupInt4
from .matmul import DTYPES, Rows
from .selected import Columns, Selection


class InputSelect(NamedTuple):
    """A floating-point W^T `[K, N]`; `parts` and the rest as in `selected`."""

    weight: Tensor
    parts: Tensor
    thresholds: Tensor | None
    norms: Tensor | None
    V: Tensor | None
    U: Tensor | None
    counts: Tensor | None


class InputSelectInt4(NamedTuple):
    """Codes of W^T `[K, N]`, as `int4` lays them out, or with `numbers` and `row_start` as `group_int4` does."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    numbers: Tensor | None
    row_start: Tensor | None
    parts: Tensor
    thresholds: Tensor | None
    norms: Tensor | None
    V: Tensor | None
    U: Tensor | None
    counts: Tensor | None
    bits: int
    group_size: int
    n: int


def prepare(weight: Weight) -> InputSelect:
    """bf16 weights that were loaded into an fp32 model are stored as bf16 again: half the bytes, the same numbers."""
    names = ("weight_t", "V", "U")
    found = {name: weight.tensors[name] for name in names if name in weight.tensors}
    if weight.dtype == torch.float32 and all(_is_bfloat16(tensor) for tensor in found.values()):
        found = {name: tensor.bfloat16() for name, tensor in found.items()}
    selection = _selection(weight)._replace(V=found.get("V"), U=found.get("U"))
    done = input_select.prepare(found["weight_t"], selection)
    (dense,) = done.weight.tensors
    assert dense is not None
    return InputSelect(dense, done.parts, *done.selection)


def restore(form: InputSelect, weight: Weight) -> Mapping[str, Tensor]:
    """Inverse of `prepare`."""
    floating = {"weight_t": form.weight, **_stored_selection(_columns(form), weight)}
    return {
        name: tensor.to(weight.dtype) if tensor.is_floating_point() else tensor for name, tensor in floating.items()
    }


def linear(x: Tensor, form: InputSelect, bias: Tensor | None) -> Tensor:
    """See `selected.linear`."""
    return selected.linear(_columns(form), x, bias)


def prepare_int4(weight: Weight) -> InputSelectInt4:
    """From dense integers, or kept groups, along the outputs."""
    (n, _), selection = weight.shape, _selection(weight)
    bits, size = weight.settings["bits"], weight.settings["group_size"]
    if "index" in weight.tensors:
        done = input_select_int4.prepare_groups([weight.stored(groups.Groups)], selection, [n])
    else:
        packed = [weight.stored(integers.Integers)]
        done = input_select_int4.prepare(packed, selection, [n], bits=bits, group_size=size)
    codes, scales, zeros, numbers, row_start = (*done.weight.tensors, None, None)[:5]  # dense integers have three
    assert codes is not None and scales is not None
    tensors = (codes, scales, zeros, numbers, row_start)
    return InputSelectInt4(*tensors, done.parts, *done.selection, bits, size, n)


def restore_int4(form: InputSelectInt4, weight: Weight) -> Mapping[str, Tensor]:
    """Inverse of `prepare_int4`."""
    codes: groups.Groups | integers.Integers
    if form.numbers is not None and form.row_start is not None:
        codes = group_int4.restore(_group_int4(form))
    else:
        codes = int4.restore(_int4(form))
    stored = {name: tensor for name, tensor in codes._asdict().items() if tensor is not None}
    return {**stored, **_stored_selection(_columns_int4(form), weight)}


def linear_int4(x: Tensor, form: InputSelectInt4, bias: Tensor | None) -> Tensor:
    """See `selected.linear`."""
    return selected.linear(_columns_int4(form), x, bias)


def _columns(form: InputSelect) -> Columns:
    weight, parts, *selection = form
    k, n = weight.shape
    rows = Rows("plain", (DTYPES[weight.dtype],), k, n, n, n, n, (weight,), weight.dtype)
    return Columns(rows, k, n, parts, Selection(*selection))


def _columns_int4(form: InputSelectInt4) -> Columns:
    selection = Selection(form.thresholds, form.norms, form.V, form.U, form.counts)
    rows = int4.rows(_int4(form)) if form.numbers is None else group_int4.rows(_group_int4(form))
    return Columns(rows, rows.n, form.n, form.parts, selection)


def _int4(form: InputSelectInt4) -> int4.Integers:
    return int4.Integers(form.codes, form.scales, form.zeros, form.bits, form.group_size, form.n)


def _group_int4(form: InputSelectInt4) -> GroupInt4:
    assert form.numbers is not None and form.row_start is not None
    return GroupInt4(form.codes, form.scales, form.zeros, form.numbers, form.row_start, form.group_size, form.n)


def _selection(weight: Weight) -> InputSelection:
    return weight.selection or every_input(weight.device)


def _stored_selection(columns: Columns, weight: Weight) -> dict[str, Tensor]:
    """The tensors of `formats.input_select` again, in the weight's dtype."""
    if not weight.settings["selects"]:
        return {}
    thresholds, norms, V, U, counts = columns.selection
    stored = {} if counts is None else {"counts": counts}
    if thresholds is not None:
        stored["thresholds"] = to_bits(thresholds)
    if norms is not None:
        stored["norms"] = to_bits(norms)
    if V is not None and U is not None:
        places = selected.output_columns(columns.parts, columns.weight.span, columns.weight.stride)
        stored |= {"V": V.to(weight.dtype), "U": U[:, places].T.contiguous().to(weight.dtype)}
    return stored


def _is_bfloat16(values: Tensor) -> bool:
    return bool((values.bfloat16().to(values.dtype) == values).all())
