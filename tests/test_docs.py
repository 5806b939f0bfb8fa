"""Numbers in the README and in recipes are those that were measured: docs/results/, made by scripts/make_results.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import read
from halfweight.compress.recipe import named_recipes

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("SmolLM2-135M", "SmolLM2-135M-dithered", "Gemma-3-270M")


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], float]:
    """Test perplexities by model and recipe, or `dense`."""
    results = read(ROOT / "docs" / "results" / "results.json")
    found = {(row["model"], row["recipe"]): row["test"]["perplexity"] for row in results["rows"] if not row["changes"]}
    return found | {(model, "dense"): perplexity for model, perplexity in results["dense"].items()}


def test_the_readme_has_the_measured_perplexities(measured: dict[tuple[str, str], float]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    seen = 0
    for title, cells in re.findall(r"^\| ([^|]+) \|[^|]+\|((?: [\d.]* ?\|){3})$", text, re.MULTILINE):
        recipe = re.search(r"`([\w-]+)`|^(dense)$", title)
        for model, cell in zip(COLUMNS, (cell.strip() for cell in cells.split("|")), strict=False):
            if recipe and cell:
                assert cell == f"{measured[model, recipe[1] or recipe[2]]:.2f}", f"{title}, {model}"
                seen += 1
    assert seen >= 20


@pytest.mark.parametrize("name", named_recipes())
def test_recipes_say_what_they_reach(name: str, measured: dict[tuple[str, str], float]) -> None:
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    said = re.findall(r"(SmolLM2-135M|Gemma-3-270M)(,? dithered)?[^;>]*? ([\d.]+) -> (\d+(?:\.\d+)?)", text)
    assert said
    for model, dithered, dense, perplexity in said:
        model += "-dithered" if dithered else ""
        digits = len(perplexity.partition(".")[2])
        assert perplexity == f"{measured[model, name]:.{digits}f}"
        if "follows prompts" not in text:
            assert dense == f"{measured[model, 'dense']:.2f}"
