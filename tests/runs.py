"""Compression runs of a tiny model: started, stopped, and what is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfweight
from halfweight import Recipe, compress_checkpoint
from halfweight.compress import backward
from halfweight.compress.report import OnProgress, Progress

BLOCKS = 4
Q1 = "model.layers.1.self_attn.q_proj"


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds timings, and the file with its hash."""
    timed = ("report.json", "SHA256SUMS")
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name not in timed}


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stop_in_block(index: int) -> OnProgress:
    """Raise after the first linear of block `index` is solved, so that exactly `index` blocks are done."""

    def progress(step: Progress) -> None:
        if step.stage == "blocks" and step.done == index and "error" in step.detail:
            raise Stop

    return progress


def stop_at(stage: str) -> OnProgress:
    def progress(step: Progress) -> None:
        if step.stage == stage:
            raise Stop

    return progress


def interrupt(dense: Path, recipe: Recipe, out: Path, progress: OnProgress, **options: Any) -> Path:
    """Run until `progress` stops it; returns the work folder it leaves."""
    with pytest.raises(Stop):
        compress_checkpoint(dense, recipe, out, progress=progress, **options)
    assert partial_of(out).is_dir()
    return partial_of(out)


def goes_through_once(stage: str, dense: Path, recipe: Recipe, out: Path, whole: Path) -> None:
    """Interrupt a run after its first block and resume it: it counts the steps of `stage`, which is done before all
    blocks, and does not take them again, and ends as the run that was not interrupted and is in `whole`."""
    before: list[Progress] = []
    after: list[Progress] = []

    def stop(step: Progress) -> None:
        before.append(step)
        stop_in_block(1)(step)

    interrupt(dense, recipe, out, stop)
    steps = [step for step in before if step.stage == stage]
    assert [step.done for step in steps] == list(range(1, steps[0].total + 1))
    compress_checkpoint(dense, recipe, out, progress=after.append)
    assert not any(step.stage == stage for step in after)
    assert contents(out) == contents(whole)


def break_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass back through the dense model begins with gradients that are not finite."""

    def broken(walker: Any, outputs: list[Tensor], *rest: Any) -> list[Tensor]:
        return [torch.full_like(x, torch.inf) for x in outputs]

    monkeypatch.setattr(backward, "label_gradients", broken)


def fails(error: type[halfweight.HalfweightError], *arguments: Any, **options: Any) -> str:
    """The one line with which compress_checkpoint raises `error`."""
    with pytest.raises(error) as caught:
        compress_checkpoint(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parsed(text_file: Path, *stages: dict[str, Any], **calibration: Any) -> Recipe:
    settings = {"data": str(text_file), "samples": 4, "seqlen": 32, **calibration}
    return Recipe.parse({"name": "test", "calibration": settings, "stages": list(stages)})


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    """Change one tensor of a single-file dense checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
