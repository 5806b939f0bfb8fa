"""Runs that are interrupted and go on, and runs that overwrite."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress import writer
from halfweight.compress.report import CompressionReport, Progress
from runs import BLOCKS, change_tensor, contents, fails, interrupt, parsed, partial_of, python, stop_at, stop_in_block

# --- interruption and resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupted_run_looks_unfinished_and_resumes_to_the_same_bytes(
    done: int, dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = interrupt(dense, small_recipe, out, stop_in_block(done))
    assert [f.name for f in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(InputError):
        halfweight.load(partial)
    with pytest.raises(InputError):
        halfweight.inspect_checkpoint(partial)
    report = compress_checkpoint(dense, small_recipe, out)
    assert report.blocks_resumed == done
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(whole)
    before = CompressionReport.model_validate_json((whole / "report.json").read_text(encoding="utf-8"))
    assert report.layers == before.layers
    assert report.dev == before.dev


def test_a_run_interrupted_again_and_again_loses_one_block_at_most(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(dense, small_recipe, out, stop_at("embed"))
    for done in range(BLOCKS):
        interrupt(dense, small_recipe, out, stop_in_block(done))
    interrupt(dense, small_recipe, out, stop_at("verify"))
    assert not out.exists()
    report = compress_checkpoint(dense, small_recipe, out)
    assert report.blocks_resumed == BLOCKS
    assert contents(out) == contents(whole)


def test_a_run_that_fails_to_publish_keeps_its_blocks(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(partial: Path, out: Path) -> None:
        raise RunError("no")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "publish", fail)
        fails(RunError, dense, small_recipe, tmp_path / "out")
    report = compress_checkpoint(dense, small_recipe, tmp_path / "out")
    assert report.blocks_resumed == BLOCKS
    assert contents(tmp_path / "out") == contents(whole)


_KILLED = """
import os, signal, sys
import torch
import halfweight

torch.set_num_threads(1)

def progress(step):
    if step.stage == "blocks" and step.done == 2 and "error" in step.detail:
        os.kill(os.getpid(), signal.SIGKILL)

halfweight.compress_checkpoint(sys.argv[1], halfweight.Recipe.load(sys.argv[2]), sys.argv[3], progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_resumes_in_another(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    done = python(_KILLED, dense, whole / "recipe.yaml", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [f.name for f in out.parent.iterdir()] == ["out.partial"]
    with pytest.raises(InputError):
        halfweight.load(partial_of(out))
    assert compress_checkpoint(dense, small_recipe, out).blocks_resumed == 2
    assert contents(out) == contents(whole)


def flip_byte(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def edit_line(file: Path, number: int, change: Callable[[str], str]) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[number] = change(lines[number])
    file.write_text("".join(lines), encoding="utf-8")


# The journal's lines: fingerprint, blocks 0, 1 and 2. Damage -> blocks still good.
DAMAGE: dict[str, tuple[Callable[[Path], Any], int]] = {
    "a part's last byte": (lambda p: flip_byte(p / "block-00001.safetensors"), 1),
    "a part's header": (lambda p: flip_byte(p / "block-00002.safetensors", 20), 2),
    "a part is cut": (lambda p: os.truncate(p / "block-00000.safetensors", 100), 0),
    "a part is gone": (lambda p: (p / "block-00001.safetensors").unlink(), 1),
    "a torn last line": (lambda p: edit_line(p / "journal.jsonl", 3, lambda line: line[: len(line) // 2]), 2),
    "a line of garbage": (lambda p: edit_line(p / "journal.jsonl", 2, lambda line: "\0garbage\n"), 1),
    "a line that is no mapping": (lambda p: edit_line(p / "journal.jsonl", 2, lambda line: "[1, 2]\n"), 1),
    "a line with another hash": (lambda p: edit_line(p / "journal.jsonl", 1, lambda line: line.replace("a", "b")), 0),
    "the fingerprint line": (lambda p: edit_line(p / "journal.jsonl", 0, lambda line: "garbage\n"), 0),
    "a leftover temporary file": (lambda p: (p / "block-00003.tmp").write_bytes(b"half"), 3),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_work_is_done_again(case: str, dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    damage, good = DAMAGE[case]
    damage(interrupt(dense, small_recipe, tmp_path / "out", stop_in_block(3)))
    report = compress_checkpoint(dense, small_recipe, tmp_path / "out")
    assert report.blocks_resumed == good
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("what", ["recipe", "seed", "text", "model", "dtype"])
def test_another_run_is_refused_until_fresh(
    what: str, dense: Path, text_file: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "out"
    shutil.copy(text_file, text)
    stage = {"pass": "wanda", "pattern": "2:4"}
    recipe = parsed(text, stage)
    partial = interrupt(dense, recipe, out, stop_in_block(2))
    before = contents(partial)
    model, options = dense, {}
    if what == "recipe":
        recipe = parsed(text, {**stage, "ignore": ["down_proj"]})
    elif what == "seed":
        recipe = parsed(text, stage, seed=1)
    elif what == "text":
        text.write_text(" ".join(reversed(text.read_text(encoding="utf-8").split())), encoding="utf-8")
    elif what == "model":
        model = tmp_path / "model"
        shutil.copytree(dense, model)
        change_tensor(model, "model.norm.weight", lambda t: t.mul_(1.5))
    else:
        options["dtype"] = "float16"
    message = fails(InputError, model, recipe, out, **options)
    assert str(partial) in message
    assert "--fresh" in message
    assert contents(partial) == before
    report = compress_checkpoint(model, recipe, out, fresh=True, **options)
    assert report.blocks_resumed == 0
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_fresh_starts_over(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    interrupt(dense, small_recipe, tmp_path / "out", stop_in_block(3))
    assert compress_checkpoint(dense, small_recipe, tmp_path / "out", fresh=True).blocks_resumed == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_foreign_folder_called_partial_is_not_deleted(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    precious = partial_of(tmp_path / "out") / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert str(precious.parent) in fails(InputError, dense, small_recipe, tmp_path / "out")
    assert precious.read_text() == "years of work"


# --- overwriting ---------------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_left_alone(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    message = fails(InputError, dense, small_recipe, out)
    assert str(out) in message
    assert "--overwrite" in message
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert contents(out) == {"mine.txt": b"mine"}


def test_an_empty_folder_is_used(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress_checkpoint(dense, small_recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_overwriting_replaces_only_at_the_end(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    def progress(step: Progress) -> None:
        if (step.stage, step.done) != ("verify", 1):
            assert contents(out) == {"mine.txt": b"mine"}

    compress_checkpoint(dense, small_recipe, out, overwrite=True, progress=progress)
    assert contents(out) == contents(whole)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_overwrite_leaves_the_old_artifact(
    dense: Path, whole: Path, small_recipe: Recipe, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    recipe = parsed(text_file, {"pass": "magnitude", "pattern": "2:4"})
    for stop in (stop_in_block(2), stop_at("verify")):
        interrupt(dense, recipe, out, stop, overwrite=True)
        assert contents(out) == contents(whole)
        halfweight.load(out)
    report = compress_checkpoint(dense, recipe, out, overwrite=True)
    assert report.blocks_resumed == BLOCKS
    assert Recipe.load(out / "recipe.yaml") == recipe
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failed_exchange_leaves_the_old_artifact(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    fails(RunError, dense, small_recipe, out, overwrite=True)
    assert contents(out) == contents(whole)


def test_a_file_in_the_way_is_refused(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        assert "not a folder" in fails(InputError, dense, small_recipe, tmp_path / "out", overwrite=overwrite)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_runs_into_one_folder_at_once(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    refusals: list[str] = []

    def second(step: Progress) -> None:
        if step.stage == "blocks" and not refusals:
            refusals.append(fails(InputError, dense, small_recipe, tmp_path / "out"))

    compress_checkpoint(dense, small_recipe, tmp_path / "out", progress=second)
    assert "another run works in it" in refusals[0]
    assert contents(tmp_path / "out") == contents(whole)


def test_a_model_that_changes_during_the_run_is_noticed(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)

    def change(step: Progress) -> None:
        if step.stage == "verify":
            os.utime(next(model.glob("*.safetensors")), (1, 1))

    with pytest.raises(RunError, match="changed during the run") as caught:
        compress_checkpoint(model, small_recipe, tmp_path / "out", progress=change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
