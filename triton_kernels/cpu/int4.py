"""Dense int4 and int8 weights on the CPU.

CPU layout of a matrix `[R, C]` with groups of G columns: every group is padded to S columns, 16 if G <= 16, else the
next multiple of 32, and the number of groups to J, even if S is 16. `codes`, 4 bits: `[R, J * S / 2]` uint8, in blocks
of 32 columns: byte i of a block holds column i in its low nibble and column 16 + i in its high one. 8 bits: `[R, J *
S]`, in order. `scales[R, J]` fp32, and `zeros[R, J]` fp32 unless symmetric. Padding decodes to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import integers
from ..formats.integers import Quantized
from . import matmul


class Integers(NamedTuple):
    """A prepared matrix; `columns` is C."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    columns: int


def prepare(packed: integers.Integers, *, bits: int, group_size: int, columns: int) -> Integers:
    """From a matrix `[R, C]` of `formats.integers`, which must have passed its `validate`."""
    quantized = integers.unpack(packed, bits=bits, group_size=group_size, columns=columns)
    stride = stride_of(group_size)
    codes, scales, zeros = spread(quantized, bits, group_size, stride)
    codes = codes.flatten(-2)
    return Integers(pack_planes(codes) if bits == 4 else codes, scales, zeros, bits, group_size, columns)


def restore(prepared: Integers) -> integers.Integers:
    """Inverse of `prepare`."""
    codes, scales, zeros, bits, group_size, columns = prepared
    dense = unpack_planes(codes) if bits == 4 else codes
    quantized = gather(dense, scales, zeros, group_size, stride_of(group_size), columns)
    return integers.pack(quantized, bits=bits, group_size=group_size)


def rows(prepared: Integers) -> matmul.Rows:
    """For `matmul`'s functions."""
    codes, scales, zeros, bits, group_size, columns = prepared
    stride = stride_of(group_size)
    padded = stride * scales.shape[-1]
    config = (bits, stride, zeros is None)
    tensors = (codes, scales, zeros)
    return matmul.Rows("integers", config, len(codes), columns, group_size, stride, padded, tensors)


def linear(x: Tensor, prepared: Integers, bias: Tensor | None = None) -> Tensor:
    """`x @ W^T + bias`; see `matmul.linear`."""
    return matmul.linear(rows(prepared))(x, bias)


def stride_of(group_size: int) -> int:
    """Columns that a group takes in the CPU layout."""
    return 16 if group_size <= 16 else -(-group_size // 32) * 32


def spread(
    quantized: Quantized, bits: int, group_size: int, stride: int, whole: int = 32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[R, J, stride]`, fp32 scales and zeros `[R, J]` (or None), padded so that J * stride fills blocks."""
    codes, scales, zeros = quantized
    groups, middle = scales.shape[-1], integers.middle(bits)
    more = groups % 2 if stride % whole else 0
    point = torch.full_like(scales, middle, dtype=torch.uint8) if zeros is None else zeros
    padded = point[..., None].expand(*point.shape, group_size).flatten(-2).clone()
    padded[..., : codes.shape[-1]] = codes
    padded = padded.unflatten(-1, (groups, group_size))
    padded = torch.cat((padded, point[..., None].expand(*point.shape, stride - group_size)), dim=-1)
    padded = F.pad(padded, (0, 0, 0, more), value=middle)
    scales = F.pad(scales.float(), (0, more))
    return padded.contiguous(), scales, None if zeros is None else F.pad(zeros.float(), (0, more), value=middle)


def gather(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, stride: int, columns: int
) -> Quantized:
    """Inverse of `spread`, for codes `[R, J * stride]`."""
    groups = -(-columns // group_size)
    dense = codes.unflatten(-1, (-1, stride))[:, :groups, :group_size].flatten(-2)[:, :columns]
    zeros = None if zeros is None else zeros[:, :groups].to(torch.uint8)
    return Quantized(dense.contiguous(), scales[:, :groups].to(torch.float16), zeros)


def pack_planes(codes: Tensor) -> Tensor:
    """Codes `[..., C]`, C a multiple of 32, two per byte: column i of a block of 32 low, column 16 + i high."""
    low, high = codes.unflatten(-1, (-1, 2, 16)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_planes(packed: Tensor) -> Tensor:
    """Inverse of `pack_planes`."""
    blocks = packed.unflatten(-1, (-1, 16))
    return torch.stack((blocks & 15, blocks >> 4), dim=-2).flatten(-3)
