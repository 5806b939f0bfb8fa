"""2:4 weights with int4 values on the CPU.

CPU layout of a weight `[N, K]` with groups of G dense columns: every group is padded to S columns, 32 if G <= 32, else
the next multiple of 64, and the number of groups to J, even if S is 32. `codes`, `scales`, `zeros` are `int4`'s over
the kept half of the columns; `masks[N, J * S / 8]` is `two_four`'s, with nothing kept in the padding of a group.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..formats import integers, two_four_int4
from ..formats.bits import pack_nibbles, unpack_nibbles
from . import matmul
from .int4 import gather, pack_planes, spread, unpack_planes
from .two_four import masks_of, meta_of


class TwoFourInt4(NamedTuple):
    """A prepared weight; `columns` is K."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    masks: Tensor
    group_size: int
    columns: int


def prepare(packed: two_four_int4.TwoFourInt4, *, group_size: int, columns: int) -> TwoFourInt4:
    """From a weight `[N, K]` of `formats.two_four_int4`, which must have passed its `validate`."""
    stride = stride_of(group_size)
    kept = integers.unpack(packed.kept, bits=4, group_size=group_size // 2, columns=columns // 2)
    codes, scales, zeros = spread(kept, 4, group_size // 2, stride // 2)
    # a nibble per four columns, moved with its group
    nibbles = unpack_nibbles(masks_of(packed.meta), columns // 4)
    whole = group_size * packed.scales.shape[-1]
    groups = F.pad(nibbles, (0, (whole - columns) // 4)).unflatten(-1, (-1, group_size // 4))
    padded = F.pad(groups, (0, (stride - group_size) // 4, 0, scales.shape[-1] - packed.scales.shape[-1]))
    return TwoFourInt4(
        pack_planes(codes.flatten(-2)), scales, zeros, pack_nibbles(padded.flatten(-2)), group_size, columns
    )


def restore(prepared: TwoFourInt4) -> two_four_int4.TwoFourInt4:
    """Inverse of `prepare`."""
    codes, scales, zeros, masks, group_size, columns = prepared
    stride = stride_of(group_size)
    kept = gather(unpack_planes(codes), scales, zeros, group_size // 2, stride // 2, columns // 2)
    nibbles = unpack_nibbles(masks, 2 * masks.shape[-1]).unflatten(-1, (-1, stride // 4))
    nibbles = nibbles[:, :, : group_size // 4].flatten(-2)[:, : columns // 4]
    meta = meta_of(pack_nibbles(nibbles))
    return two_four_int4.TwoFourInt4(*integers.pack(kept, bits=4, group_size=group_size // 2), meta)


def rows(prepared: TwoFourInt4) -> matmul.Rows:
    """For `matmul`'s functions."""
    codes, scales, zeros, masks, group_size, columns = prepared
    stride = stride_of(group_size)
    tensors = (codes, scales, zeros, masks)
    padded = stride * scales.shape[-1]
    return matmul.Rows(
        "two_four_int4", (stride, zeros is None), len(codes), columns, group_size, stride, padded, tensors
    )


def linear(x: Tensor, prepared: TwoFourInt4, bias: Tensor | None = None) -> Tensor:
    """`x @ W^T + bias`; see `matmul.linear`."""
    return matmul.linear(rows(prepared))(x, bias)


def stride_of(group_size: int) -> int:
    """Dense columns that a group takes in the CPU layout."""
    return 32 if group_size <= 32 else -(-group_size // 64) * 64
