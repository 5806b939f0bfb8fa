"""The group-sparse int4 linear as plain torch on the file's tensors: what every kernel has to reproduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..formats import groups, groups_layer
from ..formats.groups import Groups
from ..formats.groups_layer import LayerGroups


def linear(x: Tensor, packed: Groups | LayerGroups, *, segments: int = 1, bias: Tensor | None = None) -> Tensor:
    """`x[..., K]` -> `x @ W^T + bias`, `[..., N]`, computed and returned in `x`'s dtype (float64 is allowed).

    `packed` as in `formats/groups.py`, without an expert axis, or `formats/groups_layer.py`; already validated.
    """
    if isinstance(packed, LayerGroups):
        weight = groups_layer.dequantize(packed, x.shape[-1], dtype=x.dtype)
    else:
        weight = groups.dequantize(packed, x.shape[-1], segments=segments, dtype=x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
