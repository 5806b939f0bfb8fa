"""2:4 weights with floating-point values on the CPU.

CPU layout of a weight `[N, K]`, K padded to P, a multiple of 32: `values[N, P/2]`, as in the file, and `masks[N, P/8]`,
uint8: bit i of byte j is set where dense column 8j + i is kept. Nothing is kept in the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import matmul

BLOCK = 32


class TwoFour(NamedTuple):
    """A prepared weight; `columns` is K."""

    values: Tensor
    masks: Tensor
    columns: int


def prepare(values: Tensor, meta: Tensor) -> TwoFour:
    """From the tensors of `formats.two_four` `[N, K/2]` and `[N, ceil(K/8)]`, which must have passed its `validate`."""
    columns = 2 * values.shape[-1]
    padded = -(-columns // BLOCK) * BLOCK
    masks = masks_of(meta)
    return TwoFour(
        F.pad(values, (0, (padded - columns) // 2)).contiguous(),
        F.pad(masks, (0, padded // 8 - masks.shape[-1])).contiguous(),
        columns,
    )


def restore(prepared: TwoFour) -> tuple[Tensor, Tensor]:
    """Inverse of `prepare`."""
    values, masks, columns = prepared
    return values[:, : columns // 2].contiguous(), meta_of(masks[:, : -(-columns // 8)])


def rows(prepared: TwoFour) -> matmul.Rows:
    """For `matmul`'s functions."""
    values, masks, k = prepared
    padded = 2 * values.shape[-1]
    config = (matmul.DTYPES[values.dtype],)
    return matmul.Rows("two_four", config, len(values), k, k, padded, padded, (values, masks), values.dtype)


def linear(x: Tensor, prepared: TwoFour, bias: Tensor | None = None) -> Tensor:
    """`x @ W^T + bias`; see `matmul.linear`."""
    return matmul.linear(rows(prepared))(x, bias)


def masks_of(meta: Tensor) -> Tensor:
    """Bit masks of kept columns from `formats.two_four`'s positions; a padding nibble becomes an empty mask."""
    return _nibble_map(lambda nibble: (1 << (nibble & 3)) | (1 << (nibble >> 2)) if nibble else 0)[meta.long()]


def meta_of(masks: Tensor) -> Tensor:
    """Inverse of `masks_of`."""

    def positions(mask: int) -> int:
        kept = [p for p in range(4) if mask >> p & 1]
        return kept[0] | kept[1] << 2 if len(kept) == 2 else 0

    return _nibble_map(positions)[masks.long()]


def _nibble_map(change: Callable[[int], int]) -> Tensor:
    """uint8 `[256]`: what becomes of a byte when both of its nibbles are changed."""
    nibbles = [change(nibble) for nibble in range(16)]
    return torch.tensor([nibbles[byte & 15] | nibbles[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8)
