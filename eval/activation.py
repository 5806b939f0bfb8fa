"""How many of an FFN's neurons a token needs: thresholds by truncation error, and the share at p % more perplexity.

CETT-PPL-p% (Sparsing Law, Luo et al. 2024, arXiv 2411.02335, sections 3.1 and 3.2): one truncation error for all layers
gives each layer its own threshold on |x_i| * ||W_down[:, i]||; the error is the largest for which perplexity rises by
at most p %. It turns "activation sparsity" into one comparable number for any activation function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ..serving.errors import InputError
from ..serving.linear import CompressedLinear
from .metrics import cett
from .perplexity import window_losses

# The linears that read an FFN's hidden layer, by the last part of their names.
FFN_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h", "w2")

_ROWS = 256  # tokens per layer that thresholds are found on
_LEVELS = 24  # thresholds per layer whose truncation error is measured; between them it is interpolated
_STEPS = 12  # bisections of the truncation error


class LayerActivity(BaseModel):
    """One FFN, by the name of its output linear: the share of exactly `non_zero` neurons (Lazy Neuron), and the share
    `active` at the profile's truncation error, that is with |x_i| * ||W[:, i]|| >= `threshold`."""

    name: str
    non_zero: float
    active: float
    threshold: float


class ActivationProfile(BaseModel):
    """The share of `active` neurons (mean over layers) that costs at most `percent` % perplexity, and where it lies.

    `cett` is the truncation error that all layers share; perplexities are of the same `tokens`, on which thresholds
    were not found.
    """

    percent: float
    cett: float
    active: float
    perplexity: float
    sparse_perplexity: float
    tokens: int
    layers: list[LayerActivity]


@dataclass(frozen=True)
class _Curve:
    """Truncation errors `[n]`, rising, of a layer's `thresholds` `[n]`; `norms` `[F]` are its weight's columns'."""

    thresholds: Tensor
    errors: Tensor
    norms: Tensor
    non_zero: float

    def threshold(self, target: float) -> float:
        """The threshold whose truncation error is `target`, interpolated; at most the largest one measured."""
        place = int(torch.searchsorted(self.errors, torch.tensor(target, dtype=self.errors.dtype), right=True))
        if place == 0:
            return 0.0
        if place == len(self.errors):
            return float(self.thresholds[-1])
        low, high = float(self.errors[place - 1]), float(self.errors[place])
        share = (target - low) / (high - low)
        return float(self.thresholds[place - 1].lerp(self.thresholds[place], share))


def activation_profile(
    model: Any,
    calibration: Sequence[Tensor],
    dev: Sequence[Tensor],
    percent: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationProfile:
    """Find the profile of a loaded `model`: thresholds on token windows `calibration` `[T]`, perplexity on `dev`.

    `progress(done, total)` is called after each bisection. Raises InputError for a model without FFNs by known names.
    """
    layers = ffn_outputs(model)
    curves = _curves(model, layers, calibration)
    dense = _loss(model, dev)
    low, high = 0.0, 1.0
    for step in range(_STEPS):
        middle = (low + high) / 2
        with sparse_ffn(layers, _thresholds(curves, middle)):
            loss = _loss(model, dev)
        low, high = (middle, high) if math.exp(loss - dense) <= 1 + percent / 100 else (low, middle)
        if progress is not None:
            progress(step + 1, _STEPS)
    chosen = _thresholds(curves, low)
    with sparse_ffn(layers, chosen) as counts:
        sparse = _loss(model, dev)
    active = {name: kept / total for name, (kept, total) in counts.items()}
    return ActivationProfile(
        percent=percent,
        cett=low,
        active=sum(active.values()) / len(active),
        perplexity=math.exp(dense),
        sparse_perplexity=math.exp(sparse),
        tokens=sum(len(window) - 1 for window in dev),
        layers=[
            LayerActivity(
                name=name, non_zero=curves[name].non_zero, active=active[name], threshold=curves[name].threshold(low)
            )
            for name in layers
        ],
    )


def ffn_outputs(model: Any) -> dict[str, nn.Module]:
    """The model's FFN output linears by name, dense or compressed; raises InputError when it has none known."""
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in FFN_OUTPUTS and isinstance(module, (nn.Linear, CompressedLinear))
    }
    if not found:
        raise InputError(f"{type(model).__name__}: no FFN output linears (looked for {', '.join(FFN_OUTPUTS)})")
    return found


@contextmanager
def sparse_ffn(
    layers: Mapping[str, nn.Module], thresholds: Mapping[str, Tensor]
) -> Iterator[dict[str, tuple[int, int]]]:
    """Within the `with`, neurons whose |x_i| is below their layer's `thresholds` `[F]` are zero.

    Gives (active, all) neurons seen so far by layer; what was zero already is not active.
    """
    counts: dict[str, tuple[int, int]] = dict.fromkeys(layers, (0, 0))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            mask = (args[0].abs() >= thresholds[name]) & (args[0] != 0)
            kept, total = counts[name]
            counts[name] = kept + int(mask.sum()), total + mask.numel()
            return args[0] * mask, *args[1:]

        return keep

    with _hooks(layers, hook):
        yield counts


def _curves(model: Any, layers: Mapping[str, nn.Module], windows: Sequence[Tensor]) -> dict[str, _Curve]:
    """Truncation error by threshold for every layer, on some tokens of each window, from the dense forward pass."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    counts: dict[str, tuple[int, int]] = dict.fromkeys(layers, (0, 0))
    each = max(1, _ROWS // len(windows))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            rows[name].append(x[:: -(-len(x) // each)].float())
            kept, total = counts[name]
            counts[name] = kept + int(x.count_nonzero()), total + x.numel()

        return see

    with _hooks(layers, hook):
        for window in windows:
            window_losses(model, window)
    return {
        name: _curve(torch.cat(rows[name]), _dense_weight(layer), counts[name][0] / counts[name][1])
        for name, layer in layers.items()
    }


def _curve(x: Tensor, weight: Tensor, non_zero: float) -> _Curve:
    """The curve of one layer with inputs `x` `[tokens, F]` and `weight` `[N, F]`; the largest 1 % of sizes are not
    tried as thresholds, so that outliers do not stretch the grid."""
    norms = weight.norm(dim=0)
    sizes = (x.abs() * norms).flatten()
    sizes = sizes[:: -(-len(sizes) // 2**20)].sort().values
    places = torch.linspace(0, 0.99 * (len(sizes) - 1), _LEVELS).long()
    thresholds = sizes[places.to(sizes.device)]
    errors = torch.tensor([cett(x, weight, float(level), norms)[0] for level in thresholds])
    return _Curve(thresholds.cpu(), errors.cummax(0).values, norms, non_zero)


def _dense_weight(layer: nn.Module) -> Tensor:
    weight = layer.effective_weight() if isinstance(layer, CompressedLinear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _thresholds(curves: Mapping[str, _Curve], target: float) -> dict[str, Tensor]:
    """Per layer, thresholds on |x_i| `[F]` for one truncation error."""
    return {
        name: curve.threshold(target) / curve.norms.clamp_min(torch.finfo(torch.float32).tiny)
        for name, curve in curves.items()
    }


def _loss(model: Any, windows: Sequence[Tensor]) -> float:
    """Mean next-token loss in nats."""
    return float(torch.cat([window_losses(model, window) for window in windows]).double().mean())


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], make: Callable[[str], Any]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(make(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
