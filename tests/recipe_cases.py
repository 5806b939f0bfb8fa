"""What tests of recipes share: shapes of a small model, and the one line with which a recipe is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfweight import InputError, Recipe

MLP = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
SHAPES = {
    **{f"model.layers.{i}.self_attn.{name}": shape for i in range(12) for name, shape in ATTENTION.items()},
    **{f"model.layers.{i}.mlp.{name}": shape for i in range(12) for name, shape in MLP.items()},
}
WHERE = "<file>"
PRUNERS = ["magnitude", "wanda", "sparsegpt", "admm"]


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def stages(*given: dict[str, Any], **calibration: Any) -> Recipe:
    return Recipe.parse({"name": "mine", "calibration": calibration, "stages": list(given)})


def failure(folder: Path, text: str) -> str:
    """The one line that loading `text` fails with; the file is shown as WHERE."""
    file = write(folder, text)
    with pytest.raises(InputError) as error:
        Recipe.load(file)
    return one_line(error.value).replace(str(file), WHERE)


def refusal(recipe: Recipe, shapes: dict[str, tuple[int, int]] = SHAPES) -> str:
    """The one line that resolving `recipe` fails with."""
    with pytest.raises(InputError) as error:
        recipe.resolve(shapes)
    return one_line(error.value)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip() == text
    assert text.isprintable(), text  # no line breaks, no control characters
    assert "pydantic" not in text
    return text
