"""2:4 weights with int4 values in the order of sparse tensor cores: one layout for every kernel of this op.

Tiles of 16 rows by 32 columns and octets of eight tiles are those of `two_four/layout.py`, and so is `metadata`. Four
column tiles make a block; a quad is four quantization groups. Zero-padded, for one 16-byte load per lane each:

- `codes[..., row tiles, blocks, 32 lanes, 4 words]`, int32. Lane `4 g + t`, word i is tile i of the block. Its nibble
  `r + 4 p` is the kept code p of row `g + 8 (r % 2)`, group of four `t + 4 (r // 2)`: register r of the tile's A
  fragment.
- `scales[..., row tiles, quads, 8, 4]`, int32: for `g` and the four groups of a quad, the fp16 bits of row g low, of
  row g + 8 high. Padding is 0, which makes padded rows 0.
- `zeros[..., row tiles, quads, 8, 4]`, uint8, asymmetric only: for `g` and the four groups, row g in the low nibble, g
  + 8 high.

Groups have 32, 64 or 128 dense columns here (a larger group is cut, its scale repeated), or 0: one group per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import FormatError, integers, two_four_int4
from ..formats.bits import to_bits
from ..formats.two_four_int4 import TwoFourInt4
from ..two_four.layout import COLUMNS, OCTET, ROWS, prepare_metadata, restore_metadata

BLOCK = 4 * COLUMNS
GROUPS = (128, 64, 32)


class Prepared(NamedTuple):
    """See the module's docstring.

    `group`: dense columns of a kernel's group, 0 for one per row; `n`, `k`: the true sizes.
    """

    codes: Tensor
    metadata: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    n: int
    k: int

    def expert(self, index: int) -> Prepared:
        """The weight of one expert of a stack `[E, ...]`; shares memory."""
        zeros = None if self.zeros is None else self.zeros[index]
        return self._replace(
            codes=self.codes[index], metadata=self.metadata[index], scales=self.scales[index], zeros=zeros
        )


def kernel_group(group_size: int, k: int) -> int:
    """The group size that the kernels work with; raises FormatError for one that they cannot."""
    if group_size >= k:
        return 0
    for size in GROUPS:
        if group_size % size == 0:
            return size
    raise FormatError(f"the GPU kernels need groups of a multiple of {GROUPS[-1]} columns, got {group_size}")


def prepared_shapes(n: int, k: int, *, group: int, symmetric: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the GPU tensors for a weight `[n, k]`; `group` as from `kernel_group`."""
    rows = -(-n // ROWS)
    quads = -(-k // (4 * group)) if group else 1
    shapes: dict[str, tuple[int, ...]] = {
        "codes": (rows, -(-k // BLOCK), 32, 4),
        "metadata": (rows, -(-k // (OCTET * COLUMNS)), 32, 4),
        "scales": (rows, quads, 8, 4),
    }
    return shapes if symmetric else {**shapes, "zeros": (rows, quads, 8, 4)}


def prepare(packed: TwoFourInt4, *, group_size: int, k: int) -> Prepared:
    """Reorder the validated tensors of a file, `[..., N, K]`; raises FormatError for groups the kernels cannot take."""
    group = kernel_group(group_size, k)
    codes, scales, zeros = integers.unpack(packed.kept, bits=4, group_size=group_size // 2, columns=k // 2)
    n, bits = codes.shape[-2], to_bits(scales)
    if group and group < group_size:
        times, count = group_size // group, -(-k // group)
        bits = bits.repeat_interleave(times, -1)[..., :count]
        zeros = None if zeros is None else zeros.repeat_interleave(times, -1)[..., :count]
    halves = _quads(bits)
    words = halves.movedim(-4, -1).contiguous().view(torch.int32).squeeze(-1)
    pairs = None if zeros is None else _quads(zeros)
    return Prepared(
        _order_codes(codes),
        prepare_metadata(packed.meta, k // 4),
        words.movedim(-3, -2).contiguous(),
        None if pairs is None else (pairs[..., 0, :, :, :] | pairs[..., 1, :, :, :] << 4).movedim(-3, -2).contiguous(),
        group,
        n,
        k,
    )


def restore(prepared: Prepared, *, group_size: int) -> TwoFourInt4:
    """Inverse of `prepare`: the file's tensors."""
    n, k = prepared.n, prepared.k
    *lead, rows, blocks, _, _ = prepared.codes.shape
    nibbles = prepared.codes.contiguous().view(torch.uint8).view(*lead, rows, blocks, 8, 4, 4, 4)
    nibbles = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).view(*lead, rows, blocks, 8, 4, 4, 2, 2, 2)
    # row tile, block, g, t, tile, p, left or right, upper or lower -> as in `_order_codes`
    parts = nibbles.movedim((-8, -1, -6, -7, -4, -2, -5, -3), (-8, -7, -6, -5, -4, -3, -2, -1))
    codes = parts.reshape(*lead, rows * ROWS, blocks * BLOCK // 2)[..., :n, : k // 2]
    count = -(-k // group_size)
    step = group_size // prepared.group if prepared.group else 1
    halves = prepared.scales.contiguous().view(torch.int16).unflatten(-1, (4, 2))
    scales = halves.movedim((-1, -3, -4), (-4, -3, -2)).flatten(-2).flatten(-4, -2)[..., :n, ::step][..., :count]
    zeros = None
    if prepared.zeros is not None:
        pairs = torch.stack((prepared.zeros & 15, prepared.zeros >> 4), dim=-1)
        zeros = pairs.movedim((-1, -3, -4), (-4, -3, -2)).flatten(-2).flatten(-4, -2)[..., :n, ::step][..., :count]
    quantized = integers.Quantized(codes.contiguous(), scales.contiguous().view(torch.float16), zeros)
    kept = integers.pack(quantized, bits=4, group_size=group_size // 2)
    return TwoFourInt4(*kept, restore_metadata(prepared.metadata, n, k // 4))


def _order_codes(codes: Tensor) -> Tensor:
    """uint8 kept codes `[..., N, K/2]` -> int32 `[..., row tiles, blocks, 32, 4]`."""
    *lead, n, kept = codes.shape
    rows, blocks = -(-n // ROWS), -(-2 * kept // BLOCK)
    padded = pad(codes, (0, blocks * BLOCK // 2 - kept, 0, rows * ROWS - n), value=integers.middle(4))
    # row tile, upper or lower eight rows, g, block, tile, left or right four groups, t, p
    parts = padded.view(*lead, rows, 2, 8, blocks, 4, 2, 4, 2)
    nibbles = parts.movedim((-8, -5, -6, -2, -4, -1, -3, -7), (-8, -7, -6, -5, -4, -3, -2, -1))
    halves = nibbles[..., 0] | nibbles[..., 1] << 4
    return halves.flatten(-2).contiguous().view(torch.int32).reshape(*lead, rows, blocks, 32, 4)


def _quads(per_group: Tensor) -> Tensor:
    """`[..., N, J]` -> `[..., row tiles, 2 (upper or lower), 8, quads, 4]`, padded with 0."""
    *lead, n, count = per_group.shape
    padded = pad(per_group, (0, -count % 4, 0, -n % ROWS))
    return padded.reshape(*lead, -(-n // ROWS), 2, 8, -(-count // 4), 4)


def packed_bytes(n: int, k: int, *, group_size: int, symmetric: bool) -> int:
    """Bytes of the file's tensors for a weight `[n, k]`."""
    shapes = two_four_int4.packed_shapes((n, k), group_size=group_size, symmetric=symmetric)
    return sum((2 if name == "scales" else 1) * torch.Size(shape).numel() for name, shape in shapes.items())
