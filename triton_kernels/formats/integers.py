"""Dense integers: int4 or int8 codes with one fp16 scale, and optionally one integer zero point, per group of columns.

A matrix `[..., R, C]` is grouped along its last axis, whatever that axis means: K-major linears store W `[N, K]`,
input-major ones W^T `[K, N]`, embeddings `[vocabulary, hidden]`. G is even; the last of the J = ceil(C / G) groups is
padded to G columns. G >= C makes one group per row.

- `codes[..., R, J * G * bits / 8]`, uint8. 4 bits: byte b holds column 2b in its low nibble, 2b + 1 in the high one.
  8 bits: byte b is column b. Padding columns hold their group's zero point, so they decode to exactly 0.
- `scales[..., R, J]`, int16: bit patterns of fp16, finite and >= 0.
- `zeros`, asymmetric only, unsigned. 4 bits: `[..., R, ceil(J / 2)]` uint8, two groups per byte, the even one low,
  padding 0. 8 bits: `[..., R, J]` uint8. Without it every zero point is the middle code, 8 or 128.

`value = scale * (code - zero)`. The product has at most 11 + 9 significant bits, so it is exact in fp32, and code ==
zero is exactly 0. Cost: `bits + 16 / G` per weight, plus `bits / G` with zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import FormatError
from .bits import check_magnitudes, check_none, check_tensor, from_bits, pack_nibbles, to_bits, unpack_nibbles


class Quantized(NamedTuple):
    """Quantized numbers before packing, as a quantizer makes them.

    `codes[..., R, C]` uint8; `scales[..., R, J]` float16; `zeros[..., R, J]` uint8, or None for the middle code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


class Integers(NamedTuple):
    """The stored tensors (see the module's docstring)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def packed_shapes(shape: tuple[int, ...], *, bits: int, group_size: int, symmetric: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for a matrix of `shape` `[..., R, C]`; raises FormatError for a bad group size."""
    if bits not in (4, 8):
        raise FormatError(f"integers have 4 or 8 bits, got {bits}")
    if group_size < 2 or group_size % 2:
        raise FormatError(f"the group size must be even and positive, got {group_size}")
    *lead, columns = shape
    groups = -(-columns // group_size)
    shapes = {"codes": (*lead, groups * group_size * bits // 8), "scales": (*lead, groups)}
    if not symmetric:
        shapes["zeros"] = (*lead, -(-groups // 2) if bits == 4 else groups)
    return shapes


def pack(quantized: Quantized, *, bits: int, group_size: int) -> Integers:
    """Store `quantized` `[..., R, C]`. Raises FormatError for wrong shapes, dtypes, or numbers out of range."""
    codes, scales, zeros = quantized
    columns = codes.shape[-1]
    shapes = packed_shapes(tuple(codes.shape), bits=bits, group_size=group_size, symmetric=zeros is None)
    check_tensor("codes", codes, tuple(codes.shape), torch.uint8)
    check_tensor("scales", scales, shapes["scales"], torch.float16)
    check_magnitudes("scales", to_bits(scales))
    if zeros is not None:
        check_tensor("zeros", zeros, shapes["scales"], torch.uint8)
    for name, tensor in (("codes", codes), ("zeros", zeros)):
        if tensor is not None:
            check_none(name, f"no {bits}-bit code", tensor >> 4 >> (bits - 4) != 0)
    padding = shapes["scales"][-1] * group_size - columns
    if padding:
        last = torch.full_like(scales[..., -1:], middle(bits), dtype=torch.uint8) if zeros is None else zeros[..., -1:]
        codes = torch.cat((codes, last.expand(*codes.shape[:-1], padding)), dim=-1)
    if bits == 4:
        codes, zeros = pack_nibbles(codes), None if zeros is None else pack_nibbles(zeros)
    return Integers(codes.contiguous(), to_bits(scales).clone(), None if zeros is None else zeros.contiguous())


def unpack(packed: Integers, *, bits: int, group_size: int, columns: int) -> Quantized:
    """Inverse of `pack`; `columns` is C. The tensors must have passed `validate`."""
    groups = packed.scales.shape[-1]
    codes, zeros = packed.codes, packed.zeros
    if bits == 4:
        codes = unpack_nibbles(codes, groups * group_size)
        zeros = None if zeros is None else unpack_nibbles(zeros, groups)
    return Quantized(codes[..., :columns].contiguous(), from_bits(packed.scales), zeros)


def dequantize(
    packed: Integers, *, bits: int, group_size: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense matrix `[..., R, C]`: exact in fp32 and fp64, rounded once to a narrower `dtype`."""
    codes, scales, zeros = unpack(packed, bits=bits, group_size=group_size, columns=columns)
    spread = torch.arange(columns, device=codes.device) // group_size
    centered = codes.float() - (middle(bits) if zeros is None else zeros.float()[..., spread])
    return (centered * scales.float()[..., spread]).to(dtype)


def validate(packed: Integers, shape: tuple[int, ...], *, bits: int, group_size: int, symmetric: bool) -> None:
    """Raise FormatError unless `packed` is a valid matrix of `shape` `[..., R, C]`; see the module's docstring."""
    shapes = packed_shapes(shape, bits=bits, group_size=group_size, symmetric=symmetric)
    check_tensor("codes", packed.codes, shapes["codes"], torch.uint8)
    check_tensor("scales", packed.scales, shapes["scales"], torch.int16)
    check_magnitudes("scales", packed.scales)
    if symmetric != (packed.zeros is None):
        raise FormatError(
            f"{'symmetric' if symmetric else 'asymmetric'} integers, but zeros are "
            f"{'there' if symmetric else 'missing'}"
        )
    groups, columns = shapes["scales"][-1], shape[-1]
    if packed.zeros is not None:
        check_tensor("zeros", packed.zeros, shapes["zeros"], torch.uint8)
        if bits == 4 and groups % 2:
            check_none("zeros", "non-zero padding", packed.zeros[..., -1] >> 4 != 0)
    if groups * group_size > columns:
        full = groups * group_size
        codes, _, zeros = unpack(packed, bits=bits, group_size=group_size, columns=full)
        last = middle(bits) if zeros is None else zeros[..., -1:]
        check_none("codes", "padding but not its zero point", codes[..., columns:] != last)


def middle(bits: int) -> int:
    """The zero point of symmetric codes: 8 of 4 bits, 128 of 8."""
    return 1 << (bits - 1)
