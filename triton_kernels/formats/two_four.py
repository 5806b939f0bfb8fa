"""2:4 sparse weights: at most two non-zeros in every four consecutive inputs of a row.

Layout of a weight `[..., N, K]` (leading axes, such as experts, are allowed; K must be divisible by 4):

- `values[..., N, K/2]`, the weight's dtype: the two kept weights of each group, in ascending position.
- `meta[..., N, ceil(K/8)]`, uint8: one nibble per group of four, `p0 | p1 << 2`, where `0 <= p0 < p1 <= 3` are the
  kept positions. Byte `j` holds group `2j` in its low nibble and group `2j+1` in its high nibble; when K/4 is odd the
  last high nibble is zero.

A group with fewer than two non-zeros keeps explicit zeros, at the lowest free positions. That makes `pack` a function
of the weight alone, and `unpack(*pack(W)) == W` for every valid W. The order of the two indices is the one NVIDIA's
sparse `mma` expects for 16-bit types. Cost: 0.5 * 16 + 1 = 9 bits per weight at 16 bits, 0.5625 of dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import FormatError

GROUP = 4
KEPT = 2
_TOO_MANY = 255


def _nibble(used: int) -> int:
    """Metadata of a group by its non-zeros (bit i is position i): they, then the lowest free positions."""
    kept = sorted(sorted(range(GROUP), key=lambda position: not used >> position & 1)[:KEPT])
    return kept[0] | kept[1] << 2 if used.bit_count() <= KEPT else _TOO_MANY


_NIBBLES = [_nibble(used) for used in range(2**GROUP)]


def packed_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the packed tensors for a dense weight of `shape` `[..., N, K]`. Raises FormatError when K % 4 != 0."""
    *lead, k = shape
    if k % GROUP:
        raise FormatError(f"2:4 needs an input size divisible by {GROUP}, got K = {k}")
    return {"values": (*lead, k // 2), "meta": (*lead, -(-k // 8))}


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 sparse `weight` `[..., N, K]` into `(values, meta)`; raises FormatError off the pattern."""
    shapes = packed_shapes(tuple(weight.shape))
    groups = weight.unflatten(-1, (-1, GROUP))
    used = torch.zeros(groups.shape[:-1], dtype=torch.uint8, device=weight.device)  # a bit per non-zero
    for position in range(GROUP):
        used |= (groups[..., position] != 0).to(torch.uint8) << position
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=weight.device)[used.int()]
    excess = nibbles == _TOO_MANY
    if bool(excess.any()):
        where = excess.nonzero()[0].tolist()
        raise FormatError(
            f"{int(excess.sum())} groups have more than {KEPT} non-zeros;"
            f" the first is row {where[:-1]}, group {where[-1]}"
        )
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    meta = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    values = groups.gather(-1, _positions(meta, groups.shape[-2])).reshape(shapes["values"])
    return values, meta


def unpack(values: Tensor, meta: Tensor) -> Tensor:
    """Dense weight `[..., N, K]` in `values`' dtype, K = 2 * values.shape[-1]. Metadata must have passed `validate`."""
    groups = values.shape[-1] // KEPT
    positions = _positions(meta, groups)
    dense = values.new_zeros((*values.shape[:-1], groups, GROUP))
    dense.scatter_(-1, positions, values.unflatten(-1, (groups, KEPT)))
    return dense.flatten(-2)


def validate(values: Tensor, meta: Tensor, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless `(values, meta)` are a valid 2:4 weight of dense `shape` `[..., N, K]`.

    This is the guard against hostile files: after it, no position can point outside its group or name one slot twice.
    """
    expected = packed_shapes(shape)
    for name, tensor in (("values", values), ("meta", meta)):
        if tuple(tensor.shape) != expected[name]:
            raise FormatError(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}")
    if not values.dtype.is_floating_point:
        raise FormatError(f"values must be floating point, got {values.dtype}")
    if meta.dtype != torch.uint8:
        raise FormatError(f"meta must be uint8, got {meta.dtype}")
    groups = shape[-1] // GROUP
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(-2)
    if bool((nibbles[..., groups:] != 0).any()):
        raise FormatError("meta has non-zero padding")
    nibbles = nibbles[..., :groups]
    bad = (nibbles & 3) >= (nibbles >> 2)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise FormatError(f"meta has kept positions out of order in row {where[:-1]}, group {where[-1]}")


def _positions(meta: Tensor, groups: int) -> Tensor:
    """Kept positions `[..., groups, 2]`, int64 in 0..3, from packed `meta`."""
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(-2)[..., :groups]
    return torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
