"""Before serving: choose, check and compile what runs each compressed linear, and say what was chosen and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import nn

from ..triton_kernels import dispatch
from .core_inputs import BACKEND, reason_of
from .linear import CompressedWeight
from .scheme import LinearScheme
from .storage import settings_of


class Choice(BaseModel):
    """What runs one compressed linear, or embedding with its head, `[N, K]`: `backend` is `triton`, `cpu`,
    `reference` or `torch` (see `core_inputs`); `reason` says why."""

    name: str
    shape: tuple[int, int]
    pattern: str
    numbers: str
    backend: str
    reason: str


def warmup(
    model: nn.Module, batch_sizes: Sequence[int] = (1,), dtype: torch.dtype | None = None, seed: int = 0
) -> list[Choice]:
    """Prepare every compressed weight of `model` for `batch_sizes` (tokens per forward pass) and return the choices.

    Each distinct kind of linear (scheme and shape) first runs on random inputs on its own device and is compared with
    the reference; kernels that disagree are off from then on and the linears run on the reference, with the reason in
    the choice. What is compiled on first use is compiled by this. `dtype` is that of the activations (default: the
    model's).
    """
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CompressedWeight)}
    kinds: dict[tuple[str, LinearScheme, tuple[int, int]], CompressedWeight] = {}
    for module in linears.values():
        module.stored()  # what was chosen before is chosen anew, with what the checks find
        kinds.setdefault((module.op, module.scheme, module.shape), module)
    for module in kinds.values():
        for tokens in batch_sizes:
            module.verify(dtype, tokens, seed)
    for module in linears.values():
        module.prepare(dtype)
    return explain(model)


def explain(model: nn.Module) -> list[Choice]:
    """What runs each compressed weight of `model`; undecided until its first forward pass or `warmup`."""
    choices = []
    for name, module in model.named_modules():
        if isinstance(module, CompressedWeight):
            chosen = module.implementation()
            backend, reason = ("undecided", "not run yet") if chosen is None else (chosen.backend, chosen.reason)
            choices.append(_choice(name, module.scheme, module.shape, backend, reason))
    return choices


def expect(
    name: str,
    scheme: LinearScheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    op: str | None = None,
) -> Choice:
    """What would run a stored linear on `device`, from its scheme and shape alone; or another `op` on its tensors."""
    if scheme.storage == "dense":
        return _choice(name, scheme, shape, "dense", f"{scheme.pattern} has no packed form")
    if scheme.prompt_static:
        return _choice(name, scheme, shape, BACKEND, reason_of(scheme, shape, dtype, device))
    backend, reason = dispatch.expect(op or scheme.op, shape, dtype, device, settings_of(scheme))
    return _choice(name, scheme, shape, backend, reason)


def _choice(name: str, scheme: LinearScheme, shape: tuple[int, int], backend: str, reason: str) -> Choice:
    return Choice(
        name=name, shape=shape, pattern=scheme.pattern, numbers=scheme.numbers, backend=backend, reason=reason
    )
