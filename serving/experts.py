"""Mixtures of experts as ordinary linears.

transformers 5 keeps the experts of a layer fused: `gate_up_proj` `[E, 2I, D]` and `down_proj` `[E, D, I]`. Here every
expert gets three linears of its own, under the names that checkpoints on disk have (`experts.3.up_proj`), so that
calibration, passes, formats and kernels meet nothing new: an expert's inputs are the tokens that are routed to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

# Families whose experts compute down(act(gate(x)) * up(x)), weighted, and nothing else.
_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_TRANSFORMERS = (5, 23)  # the oldest release that was tried and merges experts on loading as is done here
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_STORED = re.compile(r"(\.experts\.\d+\.)(w[123])(\.weight)$")
_DENSE = re.compile(r"\.mlp(\.experts\.\d+\.)(gate_proj|up_proj|down_proj)\.weight$")
_MERGED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+$")


class Expert(nn.Module):
    """`down(act(gate(x)) * up(x))` for the tokens `x` `[T, D]` of one expert."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        size, inner = fused.down_proj.shape[1:]
        options: dict[str, Any] = {"bias": False, "device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        self.gate_proj = nn.Linear(size, inner, **options)
        self.up_proj = nn.Linear(size, inner, **options)
        self.down_proj = nn.Linear(inner, size, **options)
        self.act_fn = fused.act_fn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Experts(nn.ModuleList):
    """The experts of a layer, in the place of transformers' fused module. With `call_all`, an expert without tokens is
    called too, on `[0, D]`: whoever watches the linears then sees the same calls in every forward pass."""

    call_all = False

    def __init__(self, fused: Any) -> None:
        super().__init__(Expert(fused) for _ in range(fused.num_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, D]` -> `[T, D]`: the sum over the `[T, k]` experts of each token, times their weights `[T, k]`."""
        out = torch.zeros_like(hidden_states)
        if out.is_meta:
            return out  # there is nothing to route by
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if self.call_all or len(token):
                y = expert(hidden_states[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out


def unfuse(model: Any, wanted: Iterable[str] | None = None) -> None:
    """Replace, in place, the fused experts of `model`, or those `wanted` by the names of their modules.

    Raises InputError for experts of a model family that is not supported, or on a transformers that stores and merges
    them in other ways.
    """
    chosen = None if wanted is None else set(wanted)
    for name, module in list(model.named_modules()):
        if not _is_fused(module) or (chosen is not None and name not in chosen):
            continue
        family = model.config.get_text_config().model_type
        if family not in _FAMILIES:
            raise InputError(
                f"{name}: fused experts of model type {family!r} are not supported; those of {', '.join(_FAMILIES)} are"
            )
        installed = version("transformers")
        if tuple(map(int, installed.split(".")[:2])) < _TRANSFORMERS:
            needed = ".".join(map(str, _TRANSFORMERS))
            raise InputError(f"{name}: experts need transformers {needed} or newer; this is {installed}")
        model.set_submodule(name, Experts(module).train(module.training))


def stack_of(linear: str) -> str | None:
    """The name of the experts that the linear called `linear` belongs to, or None."""
    match = _EXPERT.match(linear)
    return match[1] if match else None


def usual_name(tensor: str) -> str:
    """A stored tensor's name with Mixtral's w1, w2, w3 spelled out."""
    return _STORED.sub(lambda match: match[1] + _MIXTRAL[match[2]] + match[3], tensor)


def disk_name(tensor: str, family: str) -> str:
    """What checkpoints of `family` call the dense weight of an expert's linear; other names stay as they are."""
    if family != "mixtral":
        return tensor
    spelled = {usual: short for short, usual in _MIXTRAL.items()}
    return _DENSE.sub(lambda match: f".block_sparse_moe{match[1]}{spelled[match[2]]}.weight", tensor)


def merged_from(name: str, experts: int, family: str) -> list[str]:
    """The stored tensors that transformers merges into the fused tensor `name`; empty when it is none."""
    stack, _, kind = name.rpartition(".")
    parts = _MERGED.get(kind, ()) if stack.endswith(".experts") else ()
    return [disk_name(f"{stack}.{number}.{part}.weight", family) for number in range(experts) for part in parts]


def _is_fused(module: nn.Module) -> bool:
    parts = (getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None))
    return all(isinstance(part, nn.Parameter) and part.ndim == 3 for part in parts)
