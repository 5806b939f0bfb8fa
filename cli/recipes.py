"""`halfweight recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from . import options
from .output import out, table, write_json


class RecipeRow(BaseModel):
    """One recipe: its name, what it says it does, and its stages as `pass pattern`."""

    name: str
    description: str
    stages: list[str]


class RecipeList(BaseModel):
    """What `--json` gets."""

    recipes: list[RecipeRow]


def recipes(
    files: Annotated[list[Path] | None, typer.Argument(help="Recipe files to validate; default: all shipped.")] = None,
    json: options.Json = None,
) -> None:
    """List the shipped recipes, or validate your own files. A bad recipe is one error line and exit code 2.

    Examples:

        halfweight recipes

        halfweight recipes my-recipe.yaml
    """
    from ..compress.recipe import Recipe, named_recipes

    loaded = [Recipe.load(file) for file in files or named_recipes().values()]
    rows = [
        RecipeRow(
            name=recipe.name,
            description=recipe.description,
            stages=[f"{stage.name} {stage.structure}" for stage in recipe.stages],
        )
        for recipe in loaded
    ]
    write_json(json, RecipeList(recipes=rows))
    shown = table("recipes", "name", "stages", "description", left=3)
    for row in rows:
        shown.add_row(row.name, ", ".join(row.stages), row.description)
    out.print(shown)
