"""Recipes and spaces that the tests of searches share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfweight import Recipe
from halfweight.compress.search.space import Budget, Space
from recipe_cases import SHAPES

BLOCKS = [{n: s for n, s in SHAPES.items() if n.startswith(f"model.layers.{i}.")} for i in range(12)]
KEEP = {"pass": "keep", "selection": {"sparsity": 0.5}}
METHODS = ["evolution", "descent", "random", "tpe", "cma"]


def recipe(text: Path | None = None, search: dict[str, Any] | None = None, **selection: Any) -> Recipe:
    stage = {"pass": "keep", "selection": {"sparsity": 0.5, **selection}}
    calibration = {} if text is None else {"data": str(text), "samples": 8, "seqlen": 32}
    search = {"trials": 8, "population": 4, "samples": 3, "seqlen": 64, **(search or {})}
    return Recipe.parse({"calibration": calibration, "stages": [stage], "search": search})


def space(settings: Recipe) -> Space:
    assert settings.search is not None
    return Space(settings.search, settings.resolve(SHAPES), BLOCKS)


def bits_unread(where: Space, budgets: dict[str, Budget]) -> float:
    return sum(member.bits * budgets[name].sparsity for name, member in where.members.items())


def need(method: str) -> None:
    for package in {"tpe": ["optuna"], "cma": ["optuna", "cmaes"]}.get(method, []):
        pytest.importorskip(package)
