"""Input selection: which inputs a linear reads, and the low-rank branch for the rest (R-Sparse, arXiv 2504.19449).

A linear `[N, K]` made of P fused parts (1 in a checkpoint); its weight lies input-major beside these tensors:

- `thresholds[P]`, int32: bit patterns of fp32, finite and >= 0. A part reads input k when `|x[k]| > threshold`,
- `norms[P, K]`, optional, int32 bit patterns of fp32, finite and >= 0: or when `|x[k]| * norm[k] > threshold`.
- `V[P, K, r]` and `U[N, r]`, optional, floating point: inputs a part does not read pass through `V U^T` instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import FormatError
from .bits import check_magnitudes, check_tensor


class InputSelection(NamedTuple):
    """The stored tensors (see the module's docstring)."""

    thresholds: Tensor
    norms: Tensor | None = None
    V: Tensor | None = None
    U: Tensor | None = None


def every_input(device: torch.device) -> InputSelection:
    """The selection of one part that reads every input that is not zero."""
    return InputSelection(torch.zeros(1, dtype=torch.int32, device=device))


def packed_shapes(
    shape: tuple[int, int], *, parts: int = 1, norms: bool = False, rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for a weight of `shape` `(N, K)`; rank 0 has no branch."""
    if parts < 1 or rank < 0:
        raise FormatError(f"input selection needs parts >= 1 and rank >= 0, got {parts} and {rank}")
    n, k = shape
    shapes: dict[str, tuple[int, ...]] = {"thresholds": (parts,)}
    if norms:
        shapes["norms"] = (parts, k)
    if rank:
        shapes["V"], shapes["U"] = (parts, k, rank), (n, rank)
    return shapes


def validate(
    packed: InputSelection, shape: tuple[int, int], *, parts: int = 1, norms: bool = False, rank: int = 0
) -> None:
    """Raise FormatError unless `packed` fits a weight of `shape` `(N, K)`."""
    shapes = packed_shapes(shape, parts=parts, norms=norms, rank=rank)
    for name, tensor in packed._asdict().items():
        if (tensor is not None) != (name in shapes):
            raise FormatError(f"{name} is {'missing' if tensor is None else 'not part of this scheme'}")
        if tensor is None:
            continue
        if name in ("thresholds", "norms"):
            check_tensor(name, tensor, shapes[name], torch.int32)
            check_magnitudes(name, tensor)
        else:
            check_tensor(name, tensor, shapes[name], tensor.dtype)
            if not tensor.dtype.is_floating_point:
                raise FormatError(f"{name} must be floating point, got {tensor.dtype}")
