"""The integer linear as plain torch on the file's tensors: what every kernel has to reproduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..formats import integers
from ..formats.integers import Integers


def linear(x: Tensor, packed: Integers, *, bits: int, group_size: int, bias: Tensor | None = None) -> Tensor:
    """`x[..., K]` -> `x @ W^T + bias`, `[..., N]`, computed and returned in `x`'s dtype (float64 is allowed).

    `packed` as in `formats/integers.py`, without an expert axis, already validated.
    """
    weight = integers.dequantize(packed, bits=bits, group_size=group_size, columns=x.shape[-1], dtype=x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
