"""Activations in files: the same bytes with less memory, and nothing left of the files, however a run ends."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands import Cli, one_line
from halfweight import InputError, Recipe, RunError, compress_checkpoint, plan
from halfweight.compress.report import Progress
from halfweight.compress.streams import Stream
from runs import BLOCKS, contents, fails, interrupt, parsed, partial_of, python, stop_in_block

LITTLE = 1e-6  # GB: less than a batch
TUNED = {"samples": 10, "block": {"epochs": 1, "batch": 1, "evaluations": 2, "rates": {"weights": 0.01}}}


def open_files(folder: Path) -> list[str]:
    """Files below `folder` that this process has open, deleted ones too."""
    gc.collect()
    handles = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return [name for handle in handles if handle.is_symlink() and (name := os.readlink(handle)).startswith(str(folder))]


def test_a_stream_in_a_file_is_a_sequence_of_its_batches(tmp_path: Path) -> None:
    batches = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 3, 4), torch.randn(0, 7), torch.randn(4, 6).T]
    kept, stream = [x.clone() for x in batches], Stream.in_file(iter(batches), tmp_path)
    assert len(stream) == 4 and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stream, kept, strict=True))
    both = stream[1:2] + Stream([torch.ones(2)])
    both.store(0, kept[1] + 1)
    both.store(1, torch.zeros(2))
    assert torch.equal(stream[1], kept[1] + 1) and torch.equal(both[1], torch.zeros(2))
    assert torch.equal(stream[0], kept[0]) and torch.equal(stream[-1], kept[3])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("case", ["wanda", "sparsegpt, tuned by block", "selection, rounded embedding"])
def test_runs_with_and_without_a_budget_give_the_same_bytes(
    case: str, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "selection" in case:
        recipe = Recipe.load("rsparse-50").with_calibration(data=str(text_file), samples=40, seqlen=64)
        recipe = recipe.with_embeddings(8)
    else:
        recipe = parsed(text_file, {"pass": case.split(",")[0]}, samples=40, seqlen=64)
    if "tuned" in case:
        recipe = Recipe.parse({**recipe.model_dump(by_alias=True), "tuning": {**TUNED, "samples": 44}})
    before = compress_checkpoint(llama, recipe, tmp_path / "memory")
    written: list[int] = []
    in_file = Stream.in_file
    monkeypatch.setattr(Stream, "in_file", lambda batches, folder: written.append(1) or in_file(batches, folder))
    after = compress_checkpoint(llama, recipe, tmp_path / "large", activation_memory=1)
    assert not written
    after = compress_checkpoint(llama, recipe, tmp_path / "files", activation_memory=LITTLE)
    assert len(written) > 2 * BLOCKS
    assert contents(tmp_path / "files") == contents(tmp_path / "memory") == contents(tmp_path / "large")
    assert after.dev == before.dev and after.layers == before.layers
    assert sorted(f.name for f in tmp_path.iterdir()) == ["files", "large", "memory"]
    if sys.platform == "linux":
        assert not open_files(tmp_path)


def test_interrupted_runs_resume_with_and_without_a_budget(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = interrupt(dense, small_recipe, out, stop_in_block(1), activation_memory=LITTLE)
    assert sorted(f.name for f in partial.iterdir()) == ["block-00000.safetensors", "journal.jsonl"]
    interrupt(dense, small_recipe, out, stop_in_block(2))
    report = compress_checkpoint(dense, small_recipe, out, activation_memory=LITTLE)
    assert report.blocks_resumed == 2
    assert contents(out) == contents(whole)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_with_activations_is_one_line_and_loses_nothing(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    import resource

    before, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out"

    def fill(step: Progress) -> None:
        if step.stage == "blocks" and step.done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))

    try:
        line = fails(RunError, dense, small_recipe, out, activation_memory=LITTLE, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(partial_of(out)) in line and "disk is full" in line and "it resumes" in line
    assert compress_checkpoint(dense, small_recipe, out, activation_memory=LITTLE).blocks_resumed == 2
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_budget_that_is_none_is_refused(budget: float, dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    line = fails(InputError, dense, small_recipe, tmp_path / "out", activation_memory=budget)
    assert "must be more than 0" in line
    with pytest.raises(InputError, match="must be more than 0"):
        plan(dense, small_recipe, activation_memory=budget)
    assert not [*tmp_path.iterdir()]


def test_the_plan_knows_the_budget(dense: Path, text_file: Path, cli: Cli, tmp_path: Path) -> None:
    stage = {"pass": "sparsegpt"}
    recipe = Recipe.parse(
        {**parsed(text_file, stage, samples=256, seqlen=64).model_dump(by_alias=True), "tuning": TUNED}
    )
    free, large, little = (plan(dense, recipe, activation_memory=budget) for budget in (None, 1.0, LITTLE))
    assert not free.activations_spill and not large.activations_spill and little.activations_spill
    assert free.activations_gb == little.activations_gb > 0
    for before, same, after in zip(free.stages, large.stages, little.stages, strict=True):
        assert (before.device_gb, before.disk_gb) == (same.device_gb, same.disk_gb)
        assert after.device_gb < before.device_gb or after.name == "metric"
    compress, within = (next(s for s in found.stages if s.name == "compress") for found in (free, little))
    assert within.disk_gb > compress.disk_gb
    assert compress.device_gb - within.device_gb > free.activations_gb / 2
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    arguments = ["plan", str(dense), "--recipe", str(tmp_path / "recipe.yaml"), "--activation-memory"]
    assert "in files" in cli(*arguments, "0.000001").out
    assert "must be more than 0" in one_line(cli(*arguments, "0"))


_PEAKS = """
import gc, json, sys
from functools import partial
import torch
import halfweight
from halfweight.eval.timing import memory_growth

torch.set_num_threads(1)
recipe, model, out = halfweight.Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3]
halfweight.compress_checkpoint(model, recipe.with_calibration(samples=4), out + "-first")
grown = []
for budget in (1e-6, None):
    gc.collect()
    work = partial(halfweight.compress_checkpoint, model, recipe, f"{out}-{budget}", activation_memory=budget)
    grown.append(memory_growth(torch.device("cpu"), work))
plan = halfweight.plan(model, recipe)
print("null" if None in grown else json.dumps([*grown, plan.activations_gb * 1e9]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_resident_memory_really_falls(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "max_position_embeddings": 512}
    recipe = parsed(text_file, {"pass": "wanda"}, samples=96, seqlen=512)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    model = make_model("llama", num_key_value_heads=4, **sizes)
    done = python(_PEAKS, tmp_path / "recipe.yaml", model, tmp_path / "out", MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    if measured is None:
        pytest.skip("this system cannot reset a process's peak memory")
    files, memory, activations = measured
    assert activations > 7e7
    assert memory > 0.7 * activations
    assert files < 0.25 * activations
