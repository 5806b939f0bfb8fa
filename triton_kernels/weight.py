"""A compressed weight as it is stored, and as an implementation holds it: what dispatch and the layouts exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """A compressed weight `[N, K]` in its stored form: `op` names the folder of kernels for it, `settings` its numbers.

    `dtype` is the model's.
    """

    op: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    settings: Mapping[str, int]
    dtype: torch.dtype
    expand: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight `[N, K]` in `dtype`: what every implementation has to reproduce."""
        return self.expand(self.tensors, dtype)

    def stored(self, form: Any) -> Any:
        """The stored tensors as a format's named tuple."""
        return form(*(self.tensors.get(name) for name in form._fields))


@dataclass(frozen=True)
class Prepared:
    """A weight in the layout of one implementation. `backend` is `triton`, `cpu` or `reference`; `reason` says why.

    `rows(ids [...], dtype)` are rows `[..., K]` of the weight, where its op is an embedding table too.
    """

    backend: str
    reason: str
    run: Callable[[Tensor, Tensor | None], Tensor]
    restore: Callable[[], Mapping[str, Tensor]]
    rows: Callable[[Tensor, torch.dtype], Tensor] | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`."""
        return self.run(x, bias)


Lookup = Callable[[Tensor, Any, torch.dtype], Tensor]


class Layout(NamedTuple):
    """How the CPU kernels store an op's weights: `prepare(weight)` makes a named tuple of tensors and integers,
    `restore` inverts it (given the weight without its tensors), `linear` computes with it, `out_features` reads N off
    it; of an op that is an embedding table too, `lookup(ids [...], form, dtype)` gives rows `[..., K]`."""

    prepare: Callable[[Weight], Any]
    restore: Callable[[Any, Weight], Mapping[str, Tensor]]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor]
    out_features: Callable[[Any], int]
    lookup: Lookup | None = None
