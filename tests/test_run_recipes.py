"""scripts/run_recipes.py: runs to make tables of, finished ones left alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from commands import load_script, read


def test_runs_are_scored_and_kept_and_failures_named(
    llama: Path, recipe: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_script("run_recipes")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(path) for path in sys.path if path))
    arguments = ["run_recipes.py", f"tiny={llama}", "--recipes", str(recipe), "no-such-recipe", "--slim"]
    arguments += [
        "--calibration",
        str(text_file),
        "--text",
        str(text_file),
        "--windows",
        "2",
        "--seqlen",
        "64",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="failed: tiny by no-such-recipe"):
        module.main()
    folder = tmp_path / "tiny-small"
    assert read(folder / "report.json")["recipe"] == "small"
    assert read(folder / "eval.json")["windows"] == read(tmp_path / "tiny-dense.json")["windows"] == 2
    assert not list(folder.glob("*.safetensors")) and not list(tmp_path.glob("tiny-no-such-recipe*"))

    commands: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, "halfweight", lambda *command: bool(commands.append(command)) or True)
    arguments.remove("no-such-recipe")
    module.main()
    assert not commands
    arguments.append("--bench")
    module.main()
    timing = ("bench", folder, "--dense", str(llama), "--batch", "1", "--json", folder / "bench.json")
    assert commands == [timing]
    (folder / "bench.json").touch()
    module.main()
    assert commands == [timing]
