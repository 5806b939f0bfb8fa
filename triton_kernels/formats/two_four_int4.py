"""2:4 sparse weights with int4 values: the pattern of `two_four`, the numbers of `integers`.

Layout of a weight `[..., N, K]` (K divisible by 4), group size G counted in dense columns (G divisible by 4):

- `codes`, `scales`, `zeros`: exactly `integers` with 4 bits over the kept matrix `[..., N, K/2]`, whose groups have
  G/2 columns; zeros are absent when symmetric.
- `meta[..., N, ceil(K/8)]`, uint8: exactly `two_four`'s.

A group of four with fewer than two non-zeros keeps codes equal to their zero point in its free slots. Cost:
`0.5 * 4 + 1 + 16 / G` bits per weight, 0.75 of dense int4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import FormatError, integers, two_four
from .integers import Integers, Quantized


class TwoFourInt4(NamedTuple):
    """The stored tensors (see the module's docstring)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    meta: Tensor

    @property
    def kept(self) -> Integers:
        """The kept matrix `[..., N, K/2]`, groups of G/2."""
        return Integers(self.codes, self.scales, self.zeros)


def packed_shapes(shape: tuple[int, ...], *, group_size: int, symmetric: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for a weight of `shape` `[..., N, K]`; raises FormatError when they do not fit."""
    if group_size % two_four.GROUP:
        raise FormatError(f"the group size must be divisible by {two_four.GROUP}, got {group_size}")
    pattern = two_four.packed_shapes(shape)
    kept = integers.packed_shapes(pattern["values"], bits=4, group_size=group_size // 2, symmetric=symmetric)
    return {**kept, "meta": pattern["meta"]}


def pack(quantized: Quantized, mask: Tensor, *, group_size: int) -> TwoFourInt4:
    """Store the codes kept by `mask`.

    `quantized` holds dense codes `[..., N, K]` with scales and zeros per G dense columns; `mask` `[..., N, K]` is bool
    with at most two kept columns in every four (FormatError otherwise). Codes outside the mask are ignored.
    """
    codes, scales, zeros = quantized
    shapes = packed_shapes(tuple(codes.shape), group_size=group_size, symmetric=zeros is None)
    if mask.dtype != torch.bool or mask.shape != codes.shape:
        raise FormatError(f"the mask must be bool of shape {list(codes.shape)}")
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tuple(tensor.shape) != shapes["scales"]:
            raise FormatError(f"{name} has shape {list(tensor.shape)}, expected {list(shapes['scales'])}")
    spread = torch.arange(codes.shape[-1], device=codes.device) // group_size
    zero = torch.full_like(codes, integers.middle(4)) if zeros is None else zeros[..., spread]
    # Codes shifted by one stay apart from the pattern's own fill, which is 0 and stands for the zero point.
    shifted, meta = two_four.pack(torch.where(mask, codes.to(torch.int16) + 1, 0))
    zero_kept = zero.unflatten(-1, (-1, two_four.GROUP))[..., : two_four.KEPT].flatten(-2)
    kept_codes = torch.where(shifted > 0, (shifted - 1).to(torch.uint8), zero_kept)
    kept = integers.pack(Quantized(kept_codes, scales, zeros), bits=4, group_size=group_size // 2)
    return TwoFourInt4(*kept, meta)


def unpack(packed: TwoFourInt4, *, group_size: int, columns: int) -> tuple[Quantized, Tensor]:
    """Inverse of `pack`: dense codes (the zero point where nothing is kept) with their mask `[..., N, K]`.

    `columns` is K. Slots the pattern filled up count as kept, with a code equal to the zero point. The tensors must
    have passed `validate`.
    """
    kept, scales, zeros = integers.unpack(packed.kept, bits=4, group_size=group_size // 2, columns=columns // 2)
    shifted = two_four.unpack(kept.to(torch.int16) + 1, packed.meta)
    spread = torch.arange(columns, device=kept.device) // group_size
    zero = torch.full_like(shifted, integers.middle(4)) if zeros is None else zeros[..., spread]
    mask = shifted > 0
    return Quantized(torch.where(mask, shifted - 1, zero).to(torch.uint8), scales, zeros), mask


def dequantize(packed: TwoFourInt4, *, group_size: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight `[..., N, K]` with its zeros: exact in fp32 and fp64, rounded once to a narrower `dtype`."""
    kept = integers.dequantize(packed.kept, bits=4, group_size=group_size // 2, columns=columns // 2, dtype=dtype)
    return two_four.unpack(kept, packed.meta)


def validate(packed: TwoFourInt4, shape: tuple[int, ...], *, group_size: int, symmetric: bool) -> None:
    """Raise FormatError unless `packed` is a valid weight of dense `shape` `[..., N, K]`."""
    packed_shapes(shape, group_size=group_size, symmetric=symmetric)
    kept = two_four.packed_shapes(shape)["values"]
    integers.validate(packed.kept, kept, bits=4, group_size=group_size // 2, symmetric=symmetric)
    # two_four checks its values' shape too; any float tensor of that shape that costs no memory will do.
    two_four.validate(packed.scales.new_empty(1, dtype=torch.float16).expand(kept), packed.meta, shape)
