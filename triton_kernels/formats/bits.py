"""Bit patterns: how small floats are stored so that no dtype change can touch them, and how nibbles share a byte.

transformers casts floating-point buffers when a model is loaded in another dtype. Scales, thresholds and norms must
keep their exact bits, so files hold them as integers: fp16 as int16, fp32 as int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import FormatError

_INTEGER = {torch.float16: torch.int16, torch.float32: torch.int32}
_FLOAT = {integer: floating for floating, integer in _INTEGER.items()}
_INFINITY = {torch.int16: 0x7C00, torch.int32: 0x7F800000}


def to_bits(values: Tensor) -> Tensor:
    """fp16 -> int16 or fp32 -> int32 bit patterns, sharing memory; raises FormatError for another dtype."""
    if values.dtype not in _INTEGER:
        raise FormatError(f"expected float16 or float32, got {values.dtype}")
    return values.contiguous().view(_INTEGER[values.dtype])


def from_bits(bits: Tensor) -> Tensor:
    """Inverse of `to_bits`: int16 -> fp16, int32 -> fp32, sharing memory."""
    if bits.dtype not in _FLOAT:
        raise FormatError(f"bit patterns must be int16 or int32, got {bits.dtype}")
    return bits.contiguous().view(_FLOAT[bits.dtype])


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 values 0..15 `[..., n]` -> `[..., ceil(n/2)]`: the even one in the low nibble; padding is 0."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return (values[..., 0::2] | values[..., 1::2] << 4).contiguous()


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: the first `count` values, uint8 `[..., count]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise FormatError unless `tensor` has exactly this shape and dtype."""
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype:
        raise FormatError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")


def check_magnitudes(name: str, bits: Tensor) -> None:
    """Raise FormatError unless every bit pattern is a finite float >= 0 (as integers: from 0 to below infinity's)."""
    check_none(name, "not a finite number >= 0", (bits < 0) | (bits >= _INFINITY[bits.dtype]))


def check_none(name: str, problem: str, bad: Tensor) -> None:
    """Raise FormatError naming the first true position of `bad`."""
    if bool(bad.any()):
        raise FormatError(f"{name} has an entry that is {problem}, at {bad.nonzero()[0].tolist()}")
