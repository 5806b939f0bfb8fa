"""A compressed weight as it is stored, and as an implementation holds it: what dispatch and the layouts exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats.input_select import InputSelection
from .input_select import reference as select_reference


@dataclass(frozen=True)
class Weight:
    """A compressed weight `[N, K]` in its stored form: `op` names the folder of kernels for it, `settings` its numbers.

    `dtype` is the model's. Tensors named as in `formats.input_select` say which inputs are read.
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
        """The dense weight `[N, K]` in `dtype`."""
        return self.expand(self.tensors, dtype)

    @property
    def selection(self) -> InputSelection | None:
        """What the inputs that are read are chosen by; None when all are."""
        selects = "thresholds" in self.tensors or "counts" in self.tensors
        selection: InputSelection | None = self.stored(InputSelection) if selects else None
        return selection

    def linear(self, x: Tensor, bias: Tensor | None, *, masked: bool = True) -> Tensor:
        """`x` `[..., K]` -> `[..., N]` in x's dtype, expanded and multiplied: what every implementation reproduces.

        `masked=False` reads every input, whatever the selection.
        """
        weight, selection = self.dense(x.dtype), self.selection
        if selection is None:
            return F.linear(x, weight, bias)
        return select_reference.linear(x, weight.T, selection, bias, masked=masked)

    def stored(self, form: Any) -> Any:
        """The stored tensors as a format's named tuple."""
        return form(*(self.tensors.get(name) for name in form._fields))


@dataclass(frozen=True)
class Prepared:
    """A weight in the layout of one implementation. `backend` is `triton`, `cpu` or `reference`, or the name of another
    form; `reason` says why.

    `rows(ids [...], dtype)` are rows `[..., K]` of the weight, where its op is an embedding table too. `run_all` is
    `run` with every input read, where `run` selects them.
    """

    backend: str
    reason: str
    run: Callable[[Tensor, Tensor | None], Tensor]
    restore: Callable[[], Mapping[str, Tensor]]
    rows: Callable[[Tensor, torch.dtype], Tensor] | None = None
    run_all: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`."""
        return self.run(x, bias)


Lookup = Callable[[Tensor, Any, torch.dtype], Tensor]
Linear = Callable[[Tensor, Tensor | None], Tensor]


class Layout(NamedTuple):
    """How the CPU kernels store an op's weights: `prepare(weight)` makes a named tuple of tensors and integers,
    `restore` inverts it (given the weight without its tensors), `linear(form)(x [..., K], bias)` computes with it,
    `out_features` reads N off it; of an op that is an embedding table too, `lookup(ids [...], form, dtype)` gives rows
    `[..., K]`."""

    prepare: Callable[[Weight], Any]
    restore: Callable[[Any, Weight], Mapping[str, Tensor]]
    linear: Callable[[Any], Linear]
    out_features: Callable[[Any], int]
    lookup: Lookup | None = None
