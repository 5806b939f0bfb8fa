"""Packed int4 weights as plain dense int4: the same numbers, in the storage that every int4 kernel reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..triton_kernels.formats import groups, groups_layer, integers, two_four_int4
from ..triton_kernels.formats.groups import Groups, KeptGroups
from ..triton_kernels.formats.groups_layer import LayerGroups
from ..triton_kernels.formats.integers import Integers, Quantized
from ..triton_kernels.formats.two_four_int4 import TwoFourInt4
from .scheme import IntegerScheme, LinearScheme


def exact_int4(scheme: LinearScheme) -> IntegerScheme | None:
    """How dense int4 stores a weight of `scheme` without changing a number, or None where it cannot.

    A dropped weight becomes its group's zero point. 16-bit weights are on no grid, those along outputs on another; a
    low-rank branch is no part of a plain int4 linear.
    """
    if scheme.integers is None or scheme.integers.bits != 4 or scheme.low_rank is not None or scheme.input_major:
        return None
    # Groups always carry zero points, in their index.
    return scheme.integers if scheme.group is None else scheme.integers.model_copy(update={"symmetric": False})


def as_int4(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The stored tensors of a weight `[N, K]` of `scheme` as those of `exact_int4(scheme)`.

    The tensors must have passed `storage.validate`. Raises ValueError where dense int4 is not exact.
    """
    target = exact_int4(scheme)
    if target is None:
        raise ValueError(f"{scheme.pattern} {scheme.numbers} has no exact dense int4 form")
    size = target.group_size
    match scheme.storage:
        case "integers":
            return dict(tensors)
        case "two_four_int4":
            packed = TwoFourInt4(tensors["codes"], tensors["scales"], tensors.get("zeros"), tensors["meta"])
            quantized, _ = two_four_int4.unpack(packed, group_size=size, columns=shape[1])
        case "groups":
            kept = groups.unpack(
                Groups(tensors["codes"], tensors["scales"], tensors["index"]), shape[1], segments=scheme.segments
            )
            rows = torch.arange(shape[0], device=kept.numbers.device)[:, None].expand_as(kept.numbers)
            quantized = _spread(kept, rows, shape)
        case _:
            layer = LayerGroups(tensors["codes"], tensors["scales"], tensors["index"], tensors["row_start"])
            entries, row_start = groups_layer.unpack(layer)
            quantized = _spread(entries, groups_layer.entry_rows(row_start, len(entries.scales)), shape)
    return stored(integers.pack(quantized, bits=4, group_size=size))


def stored(packed: Integers) -> dict[str, Tensor]:
    """The tensors of `packed` by name."""
    return {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}


def rounded_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """A weight `[N, K]` rounded to symmetric int4 by each group's largest magnitude.

    As fast as any int4 of this group size, and a stand-in only: nothing is calibrated.
    """
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group_size)).unflatten(1, (-1, group_size))
    scales = (padded.abs().amax(-1) / 7).half()
    steps = torch.where(scales > 0, 1 / scales.float(), 0.0)
    codes = ((padded * steps[..., None]).round().clamp(-8, 7) + integers.middle(4)).to(torch.uint8)
    quantized = Quantized(codes.flatten(1)[:, :columns].contiguous(), scales, None)
    return stored(integers.pack(quantized, bits=4, group_size=group_size))


def _spread(kept: KeptGroups, rows: Tensor, shape: tuple[int, int]) -> Quantized:
    """Kept groups, entry by entry in `rows`, among the dropped ones: scale 0, codes equal to the zero point 0."""
    size = kept.codes.shape[-1]
    total = groups.count_groups(shape[1], size)
    codes = kept.codes.new_zeros((shape[0], total, size))
    scales, zeros = kept.scales.new_zeros((shape[0], total)), kept.codes.new_zeros((shape[0], total))
    assert kept.zeros is not None  # unpacking gives them
    codes[rows, kept.numbers], scales[rows, kept.numbers] = kept.codes, kept.scales
    zeros[rows, kept.numbers] = kept.zeros
    return Quantized(codes.flatten(1)[:, : shape[1]].contiguous(), scales, zeros)
