"""2:4 weights in the order of sparse tensor cores: one layout for every kernel of this op, made once after load.

NVIDIA's `mma.sp` m16n8k32 takes from each lane of a warp four 32-bit registers of A and one of metadata. Rows go in
tiles of 16 and columns in tiles of 32, zero-padded; eight column tiles make an octet, over which a lane needs exactly
four metadata registers. Stored so that a lane reads each with one 16-byte load:

- `fragments[..., row tiles, column tiles, 32 lanes, 4 registers]`, int32. Lane `4 g + t`, register `r`: the two kept
  values of row `g + 8 (r % 2)`, group of four `t + 4 (r // 2)` of the tile; the lower position in the low half.
- `metadata[..., row tiles, octets, 32 lanes, 4 registers]`, int32. Lane `4 g + 2 s + b`, register `r` belongs to tile
  `4 s + r` of the octet (`s` is the instruction's sparsity selector): low half for row `g`, high half for row `g + 8`,
  four nibbles each, of groups `4 b` to `4 b + 3`, as in the file: `p0 | p1 << 2`.

Kernels without tensor cores read the same words: a lane's 16 bytes are two rows by two groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import two_four

ROWS = 16  # of a tile
COLUMNS = 32  # dense columns of a tile
OCTET = 8  # tiles that share one load of metadata
FIRST_TWO = 0b0100  # the nibble of positions 0 and 1: padding must be a valid pattern too


class Prepared(NamedTuple):
    """See the module's docstring. `n`, `k`: the true sizes; `bf16`: the values are bfloat16 (1) or float16 (0)."""

    fragments: Tensor
    metadata: Tensor
    n: int
    k: int
    bf16: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, and of the activations to multiply them with."""
        return torch.bfloat16 if self.bf16 else torch.float16

    def expert(self, index: int) -> Prepared:
        """The weight of one expert of a stack `[E, ...]`; shares memory."""
        return self._replace(fragments=self.fragments[index], metadata=self.metadata[index])


def prepared_shapes(n: int, k: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the GPU tensors for a weight `[n, k]`."""
    rows, tiles = -(-n // ROWS), -(-k // COLUMNS)
    return {"fragments": (rows, tiles, 32, 4), "metadata": (rows, -(-tiles // OCTET), 32, 4)}


def prepare(values: Tensor, meta: Tensor) -> Prepared:
    """Reorder the file's tensors `[..., N, K/2]` (16-bit floats) and `[..., N, ceil(K/8)]`, both validated."""
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels take 16-bit values, got {values.dtype}")
    *lead, n, kept = values.shape
    rows, tiles = -(-n // ROWS), -(-2 * kept // COLUMNS)
    padded = pad(values.view(torch.int16), (0, 16 * tiles - kept, 0, ROWS * rows - n))
    # row tile, upper or lower eight rows, g, column tile, left or right four groups, t, which of the pair
    parts = padded.view(*lead, rows, 2, 8, tiles, 2, 4, 2)
    lanes = parts.movedim((-4, -5, -2, -3, -6), (-6, -5, -4, -3, -2)).contiguous()
    fragments = lanes.view(torch.int32).reshape(*lead, rows, tiles, 32, 4)
    return Prepared(fragments, prepare_metadata(meta, kept // 2), n, 2 * kept, int(values.dtype == torch.bfloat16))


def restore(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Inverse of `prepare`: `(values, meta)` of the file."""
    *lead, rows, tiles, _, _ = prepared.fragments.shape
    lanes = prepared.fragments.contiguous().view(torch.int16).view(*lead, rows, tiles, 8, 4, 2, 2, 2)
    parts = lanes.movedim((-6, -5, -4, -3, -2), (-4, -5, -2, -3, -6))
    values = parts.reshape(*lead, rows * ROWS, tiles * 16)[..., : prepared.n, : prepared.k // 2]
    return values.contiguous().view(prepared.dtype), restore_metadata(prepared.metadata, prepared.n, prepared.k // 4)


def prepare_metadata(meta: Tensor, groups: int) -> Tensor:
    """The file's `meta[..., N, ceil(groups / 2)]` -> `metadata` (see the module's docstring)."""
    *lead, n, _ = meta.shape
    rows, octets = -(-n // ROWS), -(-groups // (8 * OCTET))
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(-2)[..., :groups].int()
    padding = (0, 8 * OCTET * octets - groups, 0, ROWS * rows - n)
    # row tile, upper or lower eight rows, g, octet, selector, register, b, group
    parts = pad(nibbles, padding, value=FIRST_TWO).view(*lead, rows, 2, 8, octets, 2, 4, 2, 4)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=meta.device)
    halves = (parts << shifts).sum(-1, dtype=torch.int32)
    words = halves[..., 0, :, :, :, :, :] | halves[..., 1, :, :, :, :, :] << 16
    return words.movedim((-4, -5, -3, -1, -2), (-5, -4, -3, -2, -1)).reshape(*lead, rows, octets, 32, 4).contiguous()


def restore_metadata(metadata: Tensor, n: int, groups: int) -> Tensor:
    """Inverse of `prepare_metadata`."""
    *lead, rows, octets, _, _ = metadata.shape
    words = metadata.view(*lead, rows, octets, 8, 2, 2, 4).movedim((-5, -4, -3, -2, -1), (-4, -5, -3, -1, -2))
    halves = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), dim=-6)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=metadata.device)
    nibbles = (halves[..., None] >> shifts & 15).reshape(*lead, rows * ROWS, octets * 8 * OCTET)
    nibbles = nibbles[..., :n, :groups].to(torch.uint8)
    if groups % 2:
        nibbles = pad(nibbles, (0, 1))
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous()


def packed_bytes(n: int, k: int) -> int:
    """Bytes of the file's tensors for a 16-bit weight `[n, k]`."""
    shapes = two_four.packed_shapes((n, k))
    return 2 * n * shapes["values"][-1] + n * shapes["meta"][-1]
