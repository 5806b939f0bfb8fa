"""scripts/make_results.py: tables and pictures from finished runs, with nothing of the machine in them."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from commands import load_script
from halfweight import Recipe
from halfweight.compress.passes.base import LinearBudget
from halfweight.eval.report.facts import RivalRow, Searched


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    module = load_script("make_results")
    monkeypatch.setattr(sys, "argv", ["make_results.py", *map(str, arguments)])
    module.main()


def scored(perplexity: float) -> str:
    fields = {"model": "m", "text": "/somewhere/test.txt", "perplexity": perplexity, "tokens": 100, "seqlen": 32}
    return json.dumps(fields)


def copied(artifact: Path, to: Path, perplexity: float) -> Path:
    folder = Path(shutil.copytree(artifact, to))
    (folder / "eval.json").write_text(scored(perplexity), encoding="utf-8")
    return folder


def test_results_come_from_the_runs_alone(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(artifact, tmp_path / "run", 33.25)
    dense = tmp_path / "dense.json"
    dense.write_text(scored(22.5), encoding="utf-8")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    name = f"{Path(report['model']).name}=Tiny Llama"
    run(monkeypatch, folder, "--name", name, "--dense", f"Tiny Llama={dense}", "--out", tmp_path / "results")
    files = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "results").iterdir()}
    assert set(files) == {"README.md", "results.json", "Tiny-Llama-weights.svg"}
    cells = dict(zip(*(cells_of(files["README.md"], start) for start in ("| recipe", "| small")), strict=True))
    assert (cells["bits"], cells["test ppl"]) == (f"{report['effective_bits']:.2f}", "33.25")
    assert cells["text tokens"] == str(report["calibration_tokens"])
    assert "Dense test perplexity: 22.50." in files["README.md"]
    assert "test perplexity" in "".join(ElementTree.fromstring(files["Tiny-Llama-weights.svg"]).itertext())
    assert not any(str(tmp_path) in text or "/somewhere" in text for text in files.values())


def cells_of(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_earlier_runs_are_remembered_and_replaced(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"

    def found(*folders: Path) -> dict[str, float]:
        run(monkeypatch, *folders, "--out", out)
        rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
        return {row["recipe"]: row["test"]["perplexity"] for row in rows}

    first, second, again = (copied(artifact, tmp_path / str(i), ppl) for i, ppl in enumerate((40.0, 50.0, 35.0)))
    recipe = second / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("name: small", "name: other"), encoding="utf-8")
    assert found(first) == {"small": 40.0}
    assert found(second) == {"small": 40.0, "other": 50.0}
    assert found(again) == {"small": 35.0, "other": 50.0}
    page = (out / "README.md").read_bytes()
    assert found() == {"small": 35.0, "other": 50.0} and (out / "README.md").read_bytes() == page
    with pytest.raises(SystemExit, match=r"error: no runs given, and .*results\.json remembers none"):
        run(monkeypatch, "--out", tmp_path / "nothing")


def test_other_tools_are_drawn_beside_the_runs(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(artifact, tmp_path / "run", 33.25)
    dense, compared, out = (tmp_path / name for name in ("dense.json", "compare.json", "results"))
    dense.write_text(scored(22.5), encoding="utf-8")
    rows = [{"model": "tiny", "tool": tool, "method": "2:4", "perplexity": 50.0} for tool in ("halfweight", "peer")]
    compared.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    names = (f"{Path(json.loads((folder / 'report.json').read_text())['model']).name}=Tiny", "tiny=Tiny")
    run(monkeypatch, folder, "--name", *names, "--dense", f"Tiny={dense}", "--rivals", compared, "--out", out)
    (rival,) = json.loads((out / "results.json").read_text(encoding="utf-8"))["rivals"]
    assert rival == {"model": "Tiny", "label": "peer 2:4", "bits": 16.0, "perplexity": 50.0}
    picture = (out / "Tiny-weights.svg").read_bytes()
    run(monkeypatch, "--out", out)  # remembered, and drawn to the same bytes
    assert (out / "Tiny-weights.svg").read_bytes() == picture


def test_a_comparison_says_what_the_peer_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    script = load_script("compare_llmcompressor")
    assert set(script.COUNTERPART.values()) <= set(script.PEER_BITS)
    made = script.Comparison.__new__(script.Comparison)
    numbers = {"perplexity": 23.0, "peak_gb": 1.0, "seconds": 5.0, "cpu_seconds": 5.0, "others_share": 0.0}
    made.cells = {("m", script.PEER, method, 0): numbers for method in ("w4-g64", "sparsegpt")}
    rows = [RivalRow.model_validate(made.row("m", script.PEER, method, [0])) for method in ("w4-g64", "sparsegpt")]
    assert [row.stored_bits for row in rows] == [4 + 16 / 64, 16]


def test_the_front_is_of_those_that_nothing_beats() -> None:
    front = load_script("make_results").front
    assert front([(4, 30), (3, 80), (9, 50), (4, 25), (16, 22), (3, 90)]) == [(3, 80), (4, 25), (16, 22)]


def test_what_flags_change_is_said() -> None:
    changed, best = load_script("make_results").by_flags, Recipe.load("w4-g64-best")
    assert changed(best.with_calibration(samples=8)) == []
    assert changed(best.with_tuning("block")) == ["no tuning.end_to_end"]
    assert changed(best.with_tuning(samples=160, end_to_end_epochs=2).with_embeddings(8)) == [
        *("embeddings", "tuning.samples=160", "tuning.end_to_end.epochs=2")
    ]
    (stage,) = best.stages
    half = best.model_copy(update={"stages": (stage.model_copy(update={"group_size": 32}),)})
    assert changed(half) == ["stages.0.group_size=32"]
    assert changed(best.model_copy(update={"name": "mine"}).with_tuning("block")) == []


def test_an_interrupted_run_has_no_time(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(artifact, tmp_path / "run", 33.25)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (folder / "report.json").write_text(json.dumps(report | {"blocks_resumed": 1}), encoding="utf-8")
    run(monkeypatch, folder, "--out", tmp_path / "results")
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    cells = dict(zip(*(cells_of(page, start) for start in ("| recipe", "| small")), strict=True))
    assert cells["time"] == "-"


def test_what_a_search_found_is_no_change() -> None:
    changed, asked = load_script("make_results").by_flags, Recipe.load("teal-65-fisher-searched")
    (stage,) = asked.stages
    assert stage.selection is not None and asked.search is not None
    reads = {"model.layers.0": LinearBudget(sparsity=0.5, channels=1.0)}
    selection = stage.selection.model_copy(update={"profile": reads, "allocation": "uniform"})
    found = asked.model_copy(update={"search": None, "stages": (stage.model_copy(update={"selection": selection}),)})

    def by_search(**settings: Any) -> Searched:
        searched = {"settings": asked.search.model_dump(mode="json") | settings, "groups": [[0]], "chosen": 1}
        return Searched.model_validate(searched)

    assert changed(found, by_search()) == []
    assert changed(found, by_search(trials=8)) == ["search.trials=8"]


def test_what_is_read_counts_where_tokens_select() -> None:
    script = load_script("make_results")
    row = {"model": "m", "recipe": "r", "effective_bits": 16.0}
    assert script.bits(row) == 16 and not script.selects(row)
    assert script.bits({**row, "test": {"bits_read": 8.5}}) == 8.5


def test_scores_behind_prompts_are_marked_and_not_drawn(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(artifact, tmp_path / "run", 33.25)
    score = json.loads(scored(33.25)) | {"bits_read": 8.0, "prompt_tokens": 8}
    (folder / "eval.json").write_text(json.dumps(score), encoding="utf-8")
    run(monkeypatch, folder, "--out", tmp_path / "results")
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    cells = dict(zip(*(cells_of(page, start) for start in ("| recipe", "| small")), strict=True))
    assert cells["test ppl"] == "33.25 \\*"
    assert not list((tmp_path / "results").glob("*.svg"))


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: [^\n]*report\.json: no such file"):
        run(monkeypatch, tmp_path, "--out", tmp_path)
    with pytest.raises(SystemExit, match="--name x: needs the form A=B"):
        run(monkeypatch, tmp_path, "--name", "x", "--out", tmp_path)
