"""The README's numbers are those that were measured: docs/results/results.json, made by scripts/make_results.py."""

from __future__ import annotations

import re
from pathlib import Path

from commands import read

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("SmolLM2-135M", "SmolLM2-135M-dithered", "Gemma-3-270M")


def test_the_readme_has_the_measured_perplexities() -> None:
    results = read(ROOT / "docs" / "results" / "results.json")
    measured = {
        (row["model"], row["recipe"]): row["test"]["perplexity"] for row in results["rows"] if not row["changes"]
    }
    measured |= {(model, "dense"): perplexity for model, perplexity in results["dense"].items()}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    seen = set()
    for title, cells in re.findall(r"^\| ([^|]+) \|[^|]+\|((?: [\d.]* ?\|){3})$", text, re.MULTILINE):
        recipe = title if title == "dense" else re.search(r"`([\w-]+)`", title)
        for model, cell in zip(COLUMNS, (cell.strip() for cell in cells.split("|")), strict=False):
            if recipe and cell:
                name = recipe if isinstance(recipe, str) else recipe[1]
                assert cell == f"{measured[model, name]:.2f}", f"{title}, {model}"
                seen.add((model, name))
    assert len(seen) >= 20
