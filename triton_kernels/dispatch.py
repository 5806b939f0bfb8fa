"""Which implementation runs a compressed linear, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Weight:
    """A compressed weight `[N, K]` in its stored form: `op` names the folder of kernels for it, `settings` its integers.

    `dense(dtype)` expands it: what every implementation has to reproduce.
    """

    op: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    settings: Mapping[str, int]
    dense: Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A weight in the layout of one implementation. `backend` is `triton`, `cpu` or `reference`; `reason` says why."""

    backend: str
    reason: str
    run: Callable[[Tensor, Tensor | None], Tensor]
    restore: Callable[[], Mapping[str, Tensor]]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`."""
        return self.run(x, bias)


def prepare(weight: Weight, dtype: torch.dtype) -> Prepared:
    """Choose the implementation for inputs of `dtype` on the weight's device and bring the weight into its layout."""

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.dense(x.dtype), bias)

    return Prepared("reference", "no faster implementation", run, lambda: weight.tensors)
