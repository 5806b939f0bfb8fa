"""The block walker reproduces transformers' own forward pass on every supported architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import halfweight
from halfweight.compress.blocks import BlockWalker
from halfweight.serving.checkpoint import Checkpoint
from tiny import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replaying_blocks_equals_the_plain_forward_pass(architecture: str, make_model: Callable[..., Path]) -> None:
    folder = make_model(architecture)
    windows = [torch.arange(3, 27), torch.arange(5, 29)]
    walker = BlockWalker(Checkpoint(folder), torch.device("cpu"), torch.float32)
    hidden = walker.embed(windows)
    for index in range(walker.n_blocks):
        with walker.block(index) as block:
            hidden = [walker.run(index, block, x) for x in hidden]
    losses = walker.losses(hidden, windows, logits=7 * 24)

    model = halfweight.load(folder, dtype="float32")
    for window, loss in zip(windows, losses, strict=True):
        logits = model(window[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compressing_verifies_and_reloads(
    architecture: str, make_model: Callable[..., Path], small_recipe: halfweight.Recipe, tmp_path: Path
) -> None:
    folder = make_model(architecture)
    report = halfweight.compress_checkpoint(folder, small_recipe, tmp_path / "out")
    assert report.verification.relative_difference <= report.verification.tolerance
    assert report.linear_bytes_ratio == pytest.approx(0.5625)
    model = halfweight.load(tmp_path / "out", dtype="float32")
    ids = torch.arange(3, 27)[None]
    assert torch.isfinite(model(ids).logits).all()
