"""The most that may go while perplexity grows by no more than a given share: PPL-p% of activation sparsity (Luo et al.
2024, arXiv 2411.02335), and the same for the density of weights.

Bisection over whole compressions. Perplexity is the dev set's, so that no test text is tuned on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..serving.durable import disk_errors, write_text
from ..serving.errors import InputError, RunError
from ..serving.integrity import write_sums
from . import writer
from .driver import compress_checkpoint
from .passes import StageConfig
from .recipe import Recipe
from .report import CompressionReport, OnProgress, Progress, silent

LARGEST = 0.95  # nothing is left to use beyond
_SETTINGS = "settings.json"


class Trial(BaseModel):
    """One compression: the share `removed` (of bytes read, or of weights), and the dev perplexity's growth by it."""

    removed: float
    increase: float


class TargetReport(BaseModel):
    """`trials` in the order they were made; `removed` is the largest whose `increase` is at most `target`."""

    target: float
    removed: float
    trials: list[Trial]
    report: CompressionReport


def compress_to_target(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    target: float,
    *,
    trials: int = 6,
    overwrite: bool = False,
    fresh: bool = False,
    activation_memory: float | None = None,
    progress: OnProgress = silent,
    **options: Any,
) -> TargetReport:
    """Compress `model` by `recipe` as far as the dev perplexity grows by at most `target` (0.01 is 1 %).

    What varies is the sparsity of the stages that select inputs, or else the density of those that prune; `options` are
    those of `compress_checkpoint`. Trials stay in `OUT.trials`, weights of the best alone, and the same call goes on
    with them. Raises InputError when the recipe has nothing to vary, RunError when no trial meets the target.
    """
    out, recipe = Path(out), recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    with_removed(recipe, 0.5)  # refuses a recipe with nothing to vary
    writer.check_folder(out, overwrite)
    folder = out.with_name(out.name + ".trials")
    _open(folder, {"model": str(model), "recipe": recipe.to_yaml(), "target": target, "options": repr(options)}, fresh)
    low, high = 0.0, LARGEST
    done: list[Trial] = []
    best: Path | None = None
    for number in range(trials):
        removed = (low + high) / 2
        progress(Progress("target", number, trials, f"{100 * removed:.1f} % less"))
        place = folder / f"{removed:.6f}"
        trial = _finished(place, removed)
        if trial is None:
            options["activation_memory"] = activation_memory  # may differ from what the trials began with
            compress_checkpoint(model, with_removed(recipe, removed), place, progress=progress, **options)
            trial = _finished(place, removed)
            assert trial is not None  # it has a report
        done.append(trial)
        if trial.increase <= target:
            low, worse, best = removed, best, place
        else:
            high, worse = removed, place
        if worse is not None:
            _drop_weights(worse)
    if best is None:
        raise RunError(
            f"even {100 * done[-1].removed:.1f} % less raises the dev perplexity by {100 * done[-1].increase:.1f} %;"
            " allow more, or use another recipe"
        )
    report = CompressionReport.model_validate_json((best / "report.json").read_text(encoding="utf-8"))
    report = report.model_copy(update={"out": str(out)})
    write_text(best / "report.json", report.model_dump_json(indent=2) + "\n")
    write_sums(best)
    writer.publish(best, out)
    shutil.rmtree(folder)
    progress(Progress("target", trials, trials))
    return TargetReport(target=target, removed=low, trials=done, report=report)


def with_removed(recipe: Recipe, removed: float) -> Recipe:
    """`recipe` with `removed` (0 to 1) as the sparsity (or truncation) of its selections, or without any 1 - density of
    its patterns.

    Raises InputError when there is neither.
    """
    selecting = any(stage.selection is not None for stage in recipe.stages)
    stages = [_with_removed(stage, removed, selecting) for stage in recipe.stages]
    if all(new is old for new, old in zip(stages, recipe.stages, strict=True)):
        raise InputError(f"recipe {recipe.name}: has no selection and no density, so there is nothing to vary")
    return recipe.model_copy(update={"stages": tuple(stages)})


def _with_removed(stage: StageConfig, removed: float, selecting: bool) -> StageConfig:
    if stage.selection is not None:
        if stage.selection.profile:
            raise InputError("selection.profile fixes what each linear reads, which leaves nothing to vary; remove it")
        varied = "sparsity" if stage.selection.truncation is None else "truncation"
        return stage.model_copy(update={"selection": stage.selection.model_copy(update={varied: removed})})
    if not selecting and getattr(stage, "density", None) is not None:
        return stage.model_copy(update={"density": 1 - removed})
    return stage


def _open(folder: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Make the folder of trials, or go on with one of the same `settings`."""
    file, text = folder / _SETTINGS, json.dumps(settings, sort_keys=True) + "\n"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{folder}: holds trials of another model, recipe, target or options; pass --fresh to drop them"
        )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def _finished(place: Path, removed: float) -> Trial | None:
    file = place / "report.json"
    if not file.is_file():
        return None
    dev = CompressionReport.model_validate_json(file.read_text(encoding="utf-8")).dev
    return Trial(removed=removed, increase=dev.compressed / dev.dense - 1)


def _drop_weights(place: Path) -> None:
    """Keep only the report of a trial that cannot become the result."""
    for file in place.iterdir():
        if file.name != "report.json":
            file.unlink()
