"""Input selection: which inputs a linear reads, and the low-rank branch for the rest (R-Sparse, arXiv 2504.19449).

A linear `[N, K]` made of P fused parts (1 in a checkpoint); its weight lies input-major beside these tensors:

- `norms[P, K]`, optional, int32 bit patterns of fp32, finite and >= 0: input k of a token scores `|x[k]| * norm[k]`, or
  without them `|x[k]|`, in fp32.
- `thresholds[P]`, int32: bit patterns of fp32, finite and >= 0. A part reads the inputs that score above its threshold.
- `counts[P]`, int32, 1 to K, in place of the thresholds: of every token a part reads so many inputs, those with the
  largest scores. Inputs that tie with the last of them are read too; one that scores 0 never is.
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

    thresholds: Tensor | None
    norms: Tensor | None = None
    V: Tensor | None = None
    U: Tensor | None = None
    counts: Tensor | None = None


def every_input(device: torch.device) -> InputSelection:
    """The selection of one part that reads every input that is not zero."""
    return InputSelection(torch.zeros(1, dtype=torch.int32, device=device))


def packed_shapes(
    shape: tuple[int, int], *, parts: int = 1, norms: bool = False, rank: int = 0, topk: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors for a weight of `shape` `(N, K)`; rank 0 has no branch, `topk` has counts."""
    if parts < 1 or rank < 0:
        raise FormatError(f"input selection needs parts >= 1 and rank >= 0, got {parts} and {rank}")
    n, k = shape
    shapes: dict[str, tuple[int, ...]] = {"counts" if topk else "thresholds": (parts,)}
    if norms:
        shapes["norms"] = (parts, k)
    if rank:
        shapes["V"], shapes["U"] = (parts, k, rank), (n, rank)
    return shapes


def validate(
    packed: InputSelection,
    shape: tuple[int, int],
    *,
    parts: int = 1,
    norms: bool = False,
    rank: int = 0,
    topk: bool = False,
) -> None:
    """Raise FormatError unless `packed` fits a weight of `shape` `(N, K)`."""
    shapes = packed_shapes(shape, parts=parts, norms=norms, rank=rank, topk=topk)
    for name, tensor in packed._asdict().items():
        if (tensor is not None) != (name in shapes):
            raise FormatError(f"{name} is {'missing' if tensor is None else 'not part of this scheme'}")
        if tensor is None:
            continue
        if name in ("thresholds", "norms"):
            check_tensor(name, tensor, shapes[name], torch.int32)
            check_magnitudes(name, tensor)
        elif name == "counts":
            check_tensor(name, tensor, shapes[name], torch.int32)
            if not bool(((tensor >= 1) & (tensor <= shape[1])).all()):
                raise FormatError(f"counts has an entry that is not between 1 and {shape[1]} inputs")
        else:
            check_tensor(name, tensor, shapes[name], tensor.dtype)
            if not tensor.dtype.is_floating_point:
                raise FormatError(f"{name} must be floating point, got {tensor.dtype}")
