"""scripts/make_results.py: tables and pictures from finished runs, with nothing of the machine in them."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from commands import load_script


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    module = load_script("make_results")
    monkeypatch.setattr(sys, "argv", ["make_results.py", *map(str, arguments)])
    module.main()


def scored(perplexity: float) -> str:
    fields = {"model": "m", "text": "/somewhere/test.txt", "perplexity": perplexity, "tokens": 100, "seqlen": 32}
    return json.dumps(fields)


def test_results_come_from_the_runs_alone(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "run"))
    (folder / "eval.json").write_text(scored(33.25), encoding="utf-8")
    dense = tmp_path / "dense.json"
    dense.write_text(scored(22.5), encoding="utf-8")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    name = f"{Path(report['model']).name}=Tiny Llama"
    run(monkeypatch, folder, "--name", name, "--dense", f"Tiny Llama={dense}", "--out", tmp_path / "results")
    files = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "results").iterdir()}
    assert set(files) == {"README.md", "results.json", "Tiny-Llama.svg"}
    cells = next(line for line in files["README.md"].splitlines() if line.startswith("| small")).split("|")
    assert [cell.strip() for cell in cells[2:3] + cells[7:8]] == [f"{report['effective_bits']:.2f}", "33.25"]
    assert "Dense test perplexity: 22.50." in files["README.md"]
    assert "test perplexity" in "".join(ElementTree.fromstring(files["Tiny-Llama.svg"]).itertext())
    assert not any(str(tmp_path) in text or "/somewhere" in text for text in files.values())


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"^error: [^\n]*report\.json: no such file"):
        run(monkeypatch, tmp_path, "--out", tmp_path)
    with pytest.raises(SystemExit, match="--name x: needs the form A=B"):
        run(monkeypatch, tmp_path, "--name", "x", "--out", tmp_path)
