"""The 2:4 linear as plain torch on the file's tensors: what every kernel has to reproduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..formats import two_four


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x[..., K]` -> `x @ W^T + bias`, `[..., N]`, computed and returned in `x`'s dtype (float64 is allowed).

    `values` and `meta` as in `formats/two_four.py`, without an expert axis, already validated.
    """
    weight = two_four.unpack(values, meta).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
