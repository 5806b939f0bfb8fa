"""The sparsity sweep: its cells, its numbers against a model pruned by hand, resuming, controls and the plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfweight
from commands import Cli, ok, one_line, read
from halfweight import InputError
from halfweight.compress import sparsity_sweep
from halfweight.compress.cells import Cell, erk_densities, plan_cells, prune
from halfweight.compress.recipe import Calibration
from halfweight.compress.report import Progress
from halfweight.compress.statistics import InputStatistics
from halfweight.eval.sweep_report import SweepPoint, curves_of, limits
from halfweight.eval.text import consecutive_windows, read_text, tokenize

SEQLEN, WINDOWS = 32, 4


def settings(text_file: Path, **changes: Any) -> dict[str, Any]:
    calibration = Calibration(data=str(text_file), samples=8, seqlen=32)
    return {"text": text_file, "windows": WINDOWS, "seqlen": SEQLEN, "calibration": calibration, **changes}


@pytest.fixture(scope="module")
def swept(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    sparsity_sweep.sweep(
        llama,
        out,
        methods=["magnitude", "sparsegpt", "random"],
        patterns=["unstructured", "2:4"],
        densities=[0.9, 0.5],
        dtype="float32",
        **settings(text_file),
    )
    return out


def points(file: Path) -> dict[tuple[str, str, float], dict[str, Any]]:
    return {(p["method"], p["pattern"], p["density"]): p for p in read(file / "sweep.json")["points"]}


def test_magnitude_cells_are_the_pruned_model(llama: Path, text_file: Path, swept: Path) -> None:
    tokens = tokenize(halfweight.load_tokenizer(llama), read_text(text_file))
    windows = torch.stack(consecutive_windows(tokens, SEQLEN, None, WINDOWS))
    model = halfweight.load(llama)

    def losses() -> torch.Tensor:
        with torch.no_grad():
            scores = model(windows).logits[:, :-1].log_softmax(-1)
        return -scores.gather(-1, windows[:, 1:, None])[..., 0].mean(1)

    dense = losses()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            groups = module.weight.data.unflatten(1, (-1, 4))
            order = groups.abs().argsort(dim=-1, descending=True, stable=True)  # of equal weights the first stays
            groups.scatter_(-1, order[..., 2:], 0.0)
    pruned = losses()
    report, cell = read(swept / "sweep.json"), points(swept)["magnitude", "2:4", 0.5]
    assert report["dense_perplexity"] == pytest.approx(math.exp(dense.mean()), rel=1e-4)
    assert cell["perplexity"] == pytest.approx(math.exp(pruned.mean()), rel=1e-4)
    paired = pruned - dense
    assert cell["ratio"] == pytest.approx(math.exp(paired.mean()), rel=1e-4)
    error = math.exp(paired.mean()) * float(paired.std()) / math.sqrt(WINDOWS)
    assert cell["ratio_standard_error"] == pytest.approx(error, rel=1e-3)


def test_report_has_every_cell_and_its_knees(swept: Path) -> None:
    report = read(swept / "sweep.json")
    assert len(report["points"]) == 3 * 3
    assert [(c["method"], c["pattern"]) for c in report["curves"]] == [
        (method, "unstructured") for method in ("magnitude", "sparsegpt", "random")
    ]
    assert report["resumed_points"] == 0
    assert not (swept / "state.safetensors").exists()


def test_more_cells_are_added_and_nothing_is_done_twice(llama: Path, text_file: Path, swept: Path) -> None:
    before = points(swept)
    stages: list[str] = []
    options = settings(text_file, dtype="float32", progress=lambda step: stages.append(step.detail))
    wanted = {"patterns": ["unstructured", "group16"], "densities": [0.5]}
    report = sparsity_sweep.sweep(llama, swept, methods=["magnitude", "sparsegpt", "wanda"], **wanted, **options)
    assert report.resumed_points == 2
    assert not any("sparsegpt" in stage or "magnitude unstructured" in stage for stage in stages)
    after = points(swept)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {
        ("wanda", "unstructured", 0.5),
        ("wanda", "1x16", 0.5),
        ("magnitude", "1x16", 0.5),
    }
    assert [(s.method, s.pattern) for s in report.skipped] == [("sparsegpt", "1x16")]
    again = sparsity_sweep.sweep(llama, swept, methods=["wanda"], **wanted, **options)
    assert again.resumed_points == 2
    assert len(again.points) == 12


def test_an_interrupted_sweep_goes_on_and_ends_alike(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop_in_last_block(step: Progress) -> None:
        if step.stage == "sweep" and step.done == 1 and "admm" in step.detail:
            raise Stop

    monkeypatch.setattr(sparsity_sweep, "_SAVE_SECONDS", 0.0)
    chosen = {"methods": ["wanda", "admm", "erk-random"], "patterns": ["unstructured"], "densities": [0.6]}
    whole = sparsity_sweep.sweep(llama, tmp_path / "whole", **chosen, **settings(text_file))
    with pytest.raises(Stop):
        sparsity_sweep.sweep(llama, tmp_path / "out", **chosen, **settings(text_file, progress=stop_in_last_block))
    assert (tmp_path / "out" / "state.safetensors").is_file()
    assert not (tmp_path / "out" / "sweep.json").exists()
    report = sparsity_sweep.sweep(llama, tmp_path / "out", **chosen, **settings(text_file))
    assert (whole.resumed_blocks, report.resumed_blocks) == (0, 1)
    assert report.points == whole.points
    assert report.dense_perplexity == whole.dense_perplexity


def test_another_model_or_text_is_not_mixed_in(
    make_model: Callable[..., Path], llama: Path, text_file: Path, swept: Path
) -> None:
    chosen = {"methods": ["magnitude"], "patterns": ["2:4"], "densities": [0.5]}
    with pytest.raises(InputError, match="is a sweep of another model"):
        sparsity_sweep.sweep(make_model("llama"), swept, **chosen, **settings(text_file, dtype="float32"))
    with pytest.raises(InputError, match="is a sweep of another model"):
        sparsity_sweep.sweep(llama, swept, **chosen, **settings(text_file, windows=2))


def test_other_architectures_and_patterns(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    model = make_model("gemma3_text", bos=True)
    report = sparsity_sweep.sweep(
        model,
        tmp_path,
        methods=["magnitude", "wanda", "admm", "random"],
        patterns=["group16", "4:8"],
        densities=[0.5],
        **settings(text_file),
    )
    assert report.bos
    assert all(math.isfinite(point.ratio) and point.ratio > 0 for point in report.points)
    assert len(report.points) == 8


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "random", "erk-random"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x16"])
def test_pruned_weights_have_their_pattern_and_count(method: str, pattern: str) -> None:
    if (method, pattern) in (("sparsegpt", "1x16"), ("erk-random", "2:4")):
        pytest.skip("no such cell")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 64, generator=generator), torch.randn(200, 64, generator=generator)
    statistics = InputStatistics(64, True, torch.device("cpu"))
    statistics.add(x)
    cell = Cell(method, pattern, 0.5)
    kept = prune(cell, weight, statistics, 0.5, torch.Generator().manual_seed(1)) != 0
    assert kept.float().mean() == 0.5
    assert (kept.sum(1) == 32).all()
    if pattern == "2:4":
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    if pattern == "1x16":
        counts = kept.unflatten(1, (-1, 16)).sum(-1)
        assert ((counts == 0) | (counts == 16)).all()
    again = prune(cell, weight, statistics, 0.5, torch.Generator().manual_seed(1)) != 0
    assert torch.equal(kept, again)


def test_better_methods_lose_less_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator) * torch.rand(64)
    statistics = InputStatistics(64, True, torch.device("cpu"))
    statistics.add(x)

    def lost(method: str, pattern: str) -> float:
        pruned = prune(Cell(method, pattern, 0.5), weight, statistics, 0.5, torch.Generator().manual_seed(1))
        return float(((pruned - weight) @ x.T).square().sum())

    assert lost("admm", "unstructured") < lost("sparsegpt", "unstructured") < lost("wanda", "unstructured")
    assert lost("wanda", "unstructured") < lost("random", "unstructured")
    assert lost("admm", "1x16") < lost("wanda", "1x16") < lost("random", "1x16")


def test_erk_by_hand_and_its_budget() -> None:
    # Square 10 x 10 twice and 10 x 90: (N + K) / (N K) = 0.2, 0.2, 1/9; sums 20, 20, 100. Half of 1100 weights.
    shares = erk_densities({"a": (10, 10), "b": (10, 10), "c": (10, 90)}, 0.5)
    assert shares == pytest.approx({"a": 0.2 * 550 / 140, "b": 0.2 * 550 / 140, "c": 550 / 140 / 9})
    # At 90 % the small ones would keep more than everything: they stay whole, and the other pays for it.
    shares = erk_densities({"a": (10, 10), "b": (10, 10), "c": (10, 90)}, 0.9)
    assert shares == pytest.approx({"a": 1.0, "b": 1.0, "c": 790 / 900})


def test_curves_need_two_points() -> None:
    def point(pattern: str, density: float, ratio: float) -> SweepPoint:
        return SweepPoint(
            method="m", pattern=pattern, density=density, perplexity=ratio, ratio=ratio, ratio_standard_error=None
        )

    ratios = {0.9: 1.005, 0.7: 1.04, 0.5: 1.5, 0.3: 40.0}
    (curve,) = curves_of([point("unstructured", d, r) for d, r in ratios.items()] + [point("2:4", 0.5, 2.0)])
    assert (curve.tolerance_1, curve.tolerance_5, curve.shape) == (0.1, 0.3, 0.5)
    (flat,) = curves_of([point("unstructured", d, 0.99) for d in (0.9, 0.8)])
    assert (flat.tolerance_1, flat.shape) == (0.2, None)


def test_controls_do_not_press_the_rest_to_the_bottom_of_the_picture() -> None:
    def point(method: str, ratio: float) -> SweepPoint:
        return SweepPoint(
            method=method, pattern="2:4", density=0.5, perplexity=ratio, ratio=ratio, ratio_standard_error=None
        )

    bottom, top = limits([point("wanda", 8.0), point("admm", 0.9), point("random", 1e6)])
    assert bottom < 0.9 and 8 < top < 80
    assert limits([point("random", 1e6)])[1] > 1e6
    assert limits([point("wanda", 8.0), point("magnitude", math.nan)]) == limits([point("wanda", 8.0)])
    assert limits([point("wanda", math.nan)]) == limits([point("wanda", 1.0)])


def test_what_cannot_be_swept_is_one_line(llama: Path, tmp_path: Path, cli: Cli, text_file: Path) -> None:
    base = ["sweep", llama, "--out", tmp_path / "out", "--no-plot", "--text", text_file]
    assert "did you mean 'wanda'?" in one_line(cli(*base, "--methods", "wnda"))
    assert "unknown pattern '2to4'" in one_line(cli(*base, "--patterns", "2to4"))
    assert "not between 0 and 1" in one_line(cli(*base, "--densities", "0.5,2"))
    assert "numbers, separated" in one_line(cli(*base, "--densities", "half"))
    assert "not a multiple of 5" in one_line(cli(*base, "--patterns", "2:5"))
    assert "no mask of whole groups" in one_line(cli(*base, "--methods", "sparsegpt", "--patterns", "group16"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="keeps nothing"):
        plan = plan_cells(["wanda"], ["group16"], [0.01])[0]
        sparsity_sweep.check_shapes(plan, {"a": (4, 64)})


def test_command_line_draws_the_picture(llama: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    flags = ["--methods", "magnitude,random", "--densities", "0.9,0.5", "--patterns", "unstructured,2:4"]
    data = ["--text", text_file, "--windows", 2, "--seqlen", 32, "--samples", 4, "--calibration", text_file]
    result = ok(cli("sweep", llama, "--out", out, *flags, *data, "--json", tmp_path / "s.json"))
    assert len(read(tmp_path / "s.json")["points"]) == 6
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "sweep.svg").read_text()
    for word in ("magnitude", "random", "bend", "dense perplexity"):
        assert word in result.out
