"""The 2:4 int4 linear as plain torch on the file's tensors: what every kernel has to reproduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..formats import two_four_int4
from ..formats.two_four_int4 import TwoFourInt4


def linear(x: Tensor, packed: TwoFourInt4, bias: Tensor | None = None, *, group_size: int) -> Tensor:
    """`x[..., K]` -> `x @ W^T + bias`, `[..., N]`, computed and returned in `x`'s dtype (float64 is allowed).

    `packed` as in `formats/two_four_int4.py`, without an expert axis, already validated.
    """
    weight = two_four_int4.dequantize(packed, group_size=group_size, columns=x.shape[-1], dtype=x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
