"""Activation profiles: the bisected perplexity, monotone shares, and that only what is below the threshold goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfweight
from halfweight import InputError
from halfweight.compress.calibration import self_windows
from halfweight.compress.recipe import Calibration
from halfweight.eval import activation
from halfweight.eval.activation import activation_profile, ffn_outputs, sparse_ffn
from halfweight.eval.perplexity import window_losses
from halfweight.eval.text import consecutive_windows, read_text, tokenize


@pytest.fixture(scope="module")
def windows(llama: Path, text_file: Path) -> list[Tensor]:
    tokens = tokenize(halfweight.load_tokenizer(llama), read_text(text_file))
    return consecutive_windows(tokens, 32, None, 6)


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_the_profile_costs_what_it_says(kind: str, llama: Path, compressed: Path) -> None:
    folder = llama if kind == "dense" else compressed
    # On text of its own any change to a random model costs perplexity.
    own = self_windows(Calibration(data="self", samples=32, seqlen=32), folder, None).calibration
    model = halfweight.load(folder)
    profiles = [activation_profile(model, own[:4], own[4:], percent) for percent in (0.5, 2.0)]
    for profile in profiles:
        ratio = profile.sparse_perplexity / profile.perplexity
        assert ratio == pytest.approx(1 + profile.percent / 100, abs=0.003)
        assert ratio <= 1 + profile.percent / 100
        assert [layer.name for layer in profile.layers] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert profile.active == pytest.approx(sum(layer.active for layer in profile.layers) / 2)
        assert all(layer.non_zero == 1 for layer in profile.layers)  # SiLU
    assert 0 < profiles[1].active < profiles[0].active < 1
    assert 0 < profiles[0].cett < profiles[1].cett < 1
    assert profiles[0].tokens == 28 * 31


def test_neurons_below_the_threshold_are_zero_and_counted(llama: Path, windows: list[Tensor]) -> None:
    model = halfweight.load(llama)
    layers = ffn_outputs(model)
    seen: dict[str, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    name = "model.layers.0.mlp.down_proj"
    handle = layers[name].register_forward_pre_hook(see)
    dense = window_losses(model, windows[0])
    x = seen["x"]
    handle.remove()
    cut = float(x.abs().median())
    thresholds = {key: torch.full((x.shape[-1],), cut if key == name else 0.0) for key in layers}
    with sparse_ffn(layers, thresholds) as counts:
        handle = layers[name].register_forward_pre_hook(see)  # after the masking hook
        window_losses(model, windows[0])
        handle.remove()
    assert torch.equal(seen["x"], torch.where(x.abs() >= cut, x, 0.0))
    # The decoder runs once per call; its head does not come back to it.
    assert counts[name] == (int((x.abs() >= cut).sum()), x.numel())
    assert torch.equal(window_losses(model, windows[0]), dense)


def test_thresholds_meet_their_truncation_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(16, 64, generator=generator)
    curve = activation._curve(x, weight, 1.0)
    for target in (0.1, 0.3, 0.6):
        assert activation.cett(x, weight, curve.threshold(target))[0] == pytest.approx(target, abs=0.02)
    assert curve.threshold(0.0) == pytest.approx(float((x.abs() * weight.norm(dim=0)).min()), abs=1e-2)


def test_relu_layers_report_their_zeros(make_model: Callable[..., Path], windows: list[Tensor]) -> None:
    model = halfweight.load(make_model("opt", activation_function="relu"))
    profile = activation_profile(model, windows[:2], windows[2:4], 5.0)
    assert all(0.2 < layer.non_zero < 0.8 for layer in profile.layers)
    assert all(layer.active <= layer.non_zero + 0.05 for layer in profile.layers)
    assert math.isfinite(profile.sparse_perplexity)


def test_models_without_known_ffns_are_refused() -> None:
    with pytest.raises(InputError, match="no FFN output linears"):
        ffn_outputs(nn.Sequential(nn.Linear(2, 2)))
