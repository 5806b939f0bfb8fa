"""Stored tensors of a linear as numbers `[N, K]` again: the inverse of `pack_weight`, for every storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...serving.scheme import LinearScheme
from ...serving.storage import pack_weight
from ...triton_kernels.formats import FormatError, groups, groups_layer, integers, two_four, two_four_int4
from ...triton_kernels.formats.groups import Groups, KeptGroups
from ...triton_kernels.formats.groups_layer import LayerGroups, entry_rows
from ...triton_kernels.formats.integers import Integers, Quantized
from ...triton_kernels.formats.two_four_int4 import TwoFourInt4


class Logical(NamedTuple):
    """A stored weight `[N, K]`: `weight` of 16-bit schemes, or `quantized` numbers; and the bool `mask` of what may be
    other than zero, None for everything."""

    weight: Tensor | None
    quantized: Quantized | None
    mask: Tensor | None


def unpack_weight(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Logical:
    """The numbers behind the stored `tensors` (by suffix, a branch ignored) of a linear of `shape` `(N, K)`.

    Dropped groups have scale 0 and the middle zero point. A pattern stored without metadata (4:8 in integers, 16-bit
    patterns other than 2:4) keeps what is not zero. Raises FormatError for integers along the outputs.
    """
    columns = shape[1]
    match scheme.storage:
        case "two_four":
            values, meta = tensors["values"], tensors["meta"]
            mask = two_four.unpack(torch.ones_like(values), meta) != 0
            return Logical(two_four.unpack(values, meta), None, mask)
        case "dense":
            return Logical(tensors["weight"], None, tensors["weight"] != 0)
        case "transposed":
            weight = tensors["weight_t"].T
            return Logical(weight, None, None if scheme.pattern == "dense" else weight != 0)
        case "two_four_int4":
            assert scheme.integers is not None
            packed = TwoFourInt4(tensors["codes"], tensors["scales"], tensors.get("zeros"), tensors["meta"])
            quantized, mask = two_four_int4.unpack(packed, group_size=scheme.integers.group_size, columns=columns)
            return Logical(None, quantized, mask)
        case "integers":
            assert scheme.integers is not None
            bits, size = scheme.integers.bits, scheme.integers.group_size
            stored = Integers(tensors["codes"], tensors["scales"], tensors.get("zeros"))
            quantized = integers.unpack(stored, bits=bits, group_size=size, columns=columns)
            if scheme.pattern == "dense":
                return Logical(None, quantized, None)
            spread = torch.arange(columns, device=quantized.codes.device) // size
            zeros = integers.middle(bits) if quantized.zeros is None else quantized.zeros[:, spread]
            return Logical(None, quantized, quantized.codes != zeros)
        case "groups":
            kept = groups.unpack(_groups(tensors), columns, segments=scheme.segments)
            rows = torch.arange(shape[0], device=kept.codes.device)[:, None].expand_as(kept.numbers)
            return _spread(scheme, kept, rows, shape)
        case "groups_layer":
            layer = LayerGroups(*_groups(tensors), tensors["row_start"])
            return _spread(scheme, groups_layer.unpack(layer)[0], entry_rows(layer.row_start, len(layer.scales)), shape)
        case _:
            raise FormatError("integers along the outputs cannot be trained")


def pack_logical(scheme: LinearScheme, logical: Logical) -> dict[str, Tensor]:
    """Inverse of `unpack_weight`. Raises FormatError for numbers the format cannot hold."""
    if logical.weight is not None:
        return pack_weight(logical.weight, scheme)
    assert logical.quantized is not None
    return pack_weight(logical.quantized.codes, scheme, logical.quantized, logical.mask)


def _groups(tensors: Mapping[str, Tensor]) -> Groups:
    return Groups(tensors["codes"], tensors["scales"], tensors["index"])


def _spread(scheme: LinearScheme, kept: KeptGroups, rows: Tensor, shape: tuple[int, int]) -> Logical:
    """`kept` groups, each with the row it belongs to, at their places in the whole matrix."""
    assert scheme.integers is not None and kept.zeros is not None
    (n, columns), size = shape, kept.codes.shape[-1]
    total = groups.count_groups(columns, size)
    codes = kept.codes.new_full((n, total, size), groups.MIDDLE)
    scales, zeros = kept.scales.new_zeros((n, total)), kept.zeros.new_full((n, total), groups.MIDDLE)
    alive = torch.zeros_like(codes, dtype=torch.bool)
    codes[rows, kept.numbers], scales[rows, kept.numbers] = kept.codes, kept.scales
    zeros[rows, kept.numbers], alive[rows, kept.numbers] = kept.zeros, True
    quantized = Quantized(codes.flatten(1)[:, :columns], scales, None if scheme.integers.symmetric else zeros)
    return Logical(None, quantized, alive.flatten(1)[:, :columns])
