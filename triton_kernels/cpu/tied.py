"""A tied embedding and head on the CPU: one integer matrix `[vocabulary, hidden]`, in `int4`'s layout."""

from __future__ import annotations

import torch
from torch import Tensor

from . import int4, matmul
from .int4 import Integers, prepare, restore

__all__ = ["Integers", "logits", "lookup", "prepare", "restore"]


def lookup(tokens: Tensor, prepared: Integers, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embeddings `[..., hidden]` of token ids `[...]`; raises IndexError for an id outside the vocabulary."""
    return matmul.dense_rows(int4.rows(prepared), tokens.long(), dtype)


def logits(x: Tensor, prepared: Integers) -> Tensor:
    """`x` `[..., hidden]` -> `[..., vocabulary]`; see `matmul.linear`."""
    return matmul.linear(int4.rows(prepared))(x, None)
