"""A tied embedding and head over `integers` `[vocabulary, hidden]`, as plain torch on the file's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import integers
from ..formats.integers import Integers
from ..int4.reference import linear


def lookup(ids: Tensor, packed: Integers, *, bits: int, group_size: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows `[..., hidden]` of `ids` `[...]`, rounded once to `dtype`; IndexError for an id past the vocabulary."""
    flat = ids.reshape(-1)
    rows = Integers(*(None if tensor is None else tensor[flat] for tensor in packed))  # type: ignore[arg-type]
    values = integers.dequantize(rows, bits=bits, group_size=group_size, columns=hidden, dtype=dtype)
    return values.reshape(*ids.shape, hidden)


def logits(x: Tensor, packed: Integers, *, bits: int, group_size: int) -> Tensor:
    """`x[..., hidden]` -> `[..., vocabulary]` in x's dtype."""
    return linear(x, packed, bits=bits, group_size=group_size)
