"""Faults in the middle of a run: disks, memory, files that change, damaged numbers, impatient users."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfweight.cli.output
from commands import Cli, load_script, one_line, read
from faults import failing_disk
from halfweight import HalfweightError, InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress import journal, writer
from halfweight.compress.memory import is_out_of_memory
from halfweight.compress.passes import PASSES
from halfweight.compress.passes.base import PruneResult
from halfweight.compress.report import Progress
from halfweight.serving.durable import read_lines
from runs import BLOCKS, change_tensor, contents, fails, parsed, partial_of

# --- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("code, step, words", [(errno.ENOSPC, 1, "disk is full"), (errno.EACCES, 5, "permissions")])
def test_a_disk_that_fails_at_any_operation(
    code: int, step: int, words: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model, text = make_model("llama", num_hidden_layers=1), text_file
    recipe = parsed(text, {"pass": "wanda"}, samples=2, seqlen=16)
    with failing_disk(tmp_path) as disk:
        compress_checkpoint(model, recipe, tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    assert disk.count > 40
    for at in range(1, disk.count + 1, step):
        out = tmp_path / f"run-{at}"
        with failing_disk(tmp_path, code, at), pytest.raises(HalfweightError) as caught:
            compress_checkpoint(model, recipe, out)
        message = str(caught.value)
        assert "\n" not in message and str(out) in message, at
        assert words in message or "cannot be written" in message, (at, message)
        if out.exists():  # it failed after the one rename that makes the artifact
            assert at > disk.count - 3, at
            with pytest.raises(InputError, match="not empty"):
                compress_checkpoint(model, recipe, out)
        elif at % 6 == 1 or at > disk.count - 6:
            compress_checkpoint(model, recipe, out)
        if out.exists():
            assert contents(out) == wanted, at
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial_of(out), ignore_errors=True)


def test_permission_lost_in_the_middle(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with failing_disk(tmp_path, errno.EACCES, 20):  # some six operations make a block durable
        message = fails(RunError, dense, small_recipe, out)
    assert str(partial_of(out)) in message and "check the folder's permissions" in message
    assert 0 < compress_checkpoint(dense, small_recipe, out).blocks_resumed < BLOCKS
    assert contents(out) == contents(whole)


def test_a_kill_right_after_publishing_leaves_nothing_behind(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))

    class Killed(Exception):
        pass

    def killed(folder: Path) -> None:
        if (folder / journal.JOURNAL).is_file():
            raise Killed

    rename = writer.shutil.rmtree

    def keep(folder: Path, **options: Any) -> None:
        if not folder.name.endswith(".replaced"):
            rename(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr("halfweight.compress.driver.clear_scaffold", killed)
        patch.setattr(writer.shutil, "rmtree", keep)
        with pytest.raises(Killed):
            compress_checkpoint(dense, small_recipe, out, overwrite=True)
    assert (out / journal.JOURNAL).is_file() and (tmp_path / "out.replaced").is_dir()
    assert "not empty" in fails(InputError, dense, small_recipe, out)
    assert contents(out) == contents(whole)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


# --- files that change ---------------------------------------------------------------------------------------------


def rewritten(model: Path) -> None:
    change_tensor(model, "model.layers.3.mlp.up_proj.weight", lambda t: t.mul_(2))


CHANGES: dict[str, tuple[Callable[[Path], Any], type[HalfweightError], str]] = {
    "rewritten": (rewritten, RunError, "changed during the run"),
    "cut short": (lambda model: os.truncate(model / "model.safetensors", 5000), InputError, "ends early"),
    "gone": (lambda model: (model / "model.safetensors").unlink(), InputError, "cannot read tensor"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_shard_that_changes_in_the_middle(case: str, dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    change, kind, words = CHANGES[case]
    model, out = Path(shutil.copytree(dense, tmp_path / "model")), tmp_path / "out"

    def progress(step: Progress) -> None:
        if step.stage == "blocks" and (step.done, step.detail) == (1, "model.layers.1"):
            change(model)

    message = fails(kind, model, small_recipe, out, progress=progress)
    assert words in message and str(model) in message
    assert not out.exists()


# --- numbers that are not finite -----------------------------------------------------------------------------------

UP3, HEAD = "model.layers.3.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize("name", [UP3, "model.layers.2.input_layernorm.weight", "model.norm.weight", HEAD])
def test_damage_in_a_tensor_that_no_pass_touches_is_named(
    name: str, dense: Path, text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    change_tensor(model, name, lambda t: t.view(-1)[:1].fill_(float("nan")))
    recipe = parsed(text_file, {"pass": "wanda", "ignore": ["*.mlp.*"]})
    message = fails(RunError, model, recipe, tmp_path / "out")
    if "layernorm" in name:
        assert "model.layers.2.self_attn.q_proj: its inputs are not finite" in message
    else:
        assert name in message and "NaN or infinity" in message
    assert not (tmp_path / "out").exists()


# --- memory --------------------------------------------------------------------------------------------------------


def short_of_memory(method: str, rows: int, patch: pytest.MonkeyPatch, error: Exception | None = None) -> list[int]:
    """Let the solver of `method` fail for more than `rows` outputs; returns the outputs of each of its calls."""
    real, calls = PASSES[method], []

    def solve(weight: Tensor, *arguments: Any) -> PruneResult:
        calls.append(len(weight))
        if len(weight) > rows:
            if error is not None:
                raise error
            torch.empty(2**55)
        return real.solve(weight, *arguments)

    patch.setitem(PASSES, method, replace(real, solve=solve))
    return calls


@pytest.mark.parametrize(
    "stage",
    [
        {"pass": "wanda"},
        {"pass": "sparsegpt"},
        {"pass": "admm", "pattern": "4:8"},
        {"pass": "gptq", "group_size": 16},
        {"pass": "gqsa", "pattern": "1x16", "density": 0.5, "group_size": 16},
    ],
    ids=lambda stage: stage["pass"],
)
def test_a_linear_that_does_not_fit_is_solved_in_parts(
    stage: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(text_file, stage)
    whole = compress_checkpoint(llama, recipe, tmp_path / "whole", dtype="float32")
    short_of_memory(stage["pass"], 16, monkeypatch)
    parts = compress_checkpoint(llama, recipe, tmp_path / "parts", dtype="float32")
    split = [layer for layer in parts.layers if "parts" in layer.stats]
    assert {layer.shape[0] for layer in split} == {32, 64}
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert b.stats.get("parts", 1) == max(1, b.shape[0] // 16)
        # ADMM's and GQSA's weights compete within a part instead of the whole layer: other choices, about as good.
        assert b.error == pytest.approx(a.error, rel=0.25, abs=1e-3)
        for key in a.stats.keys() - {"damping", "obs_loss"}:
            assert b.stats[key] == pytest.approx(a.stats[key], rel=0.25, abs=1e-3), key
    if stage["pass"] == "wanda":
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "stage, rows, words",
    [
        ({"pass": "wanda"}, 1, "even 2 of 32 outputs at a time"),
        ({"pass": "wanda", "pattern": "unstructured", "density": 0.5, "scope": "layer"}, 16, "out of memory by wanda;"),
        ({"pass": "gptq", "group_size": 16, "along": "outputs"}, 16, "out of memory by gptq;"),
    ],
)
def test_a_linear_that_does_not_fit_in_any_part_is_one_line(
    stage: dict[str, Any], rows: int, words: str, dense: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe, out = parsed(text_file, stage), tmp_path / "out"
    done = 0

    def progress(step: Progress) -> None:
        nonlocal done
        done = step.done if step.stage == "blocks" else done

    with pytest.MonkeyPatch.context() as patch:
        calls = short_of_memory(stage["pass"], 10**9, patch)

        def fill(step: Progress) -> None:
            progress(step)
            if done == 2:
                short_of_memory(stage["pass"], rows, patch)

        message = fails(RunError, dense, recipe, out, progress=fill)
        assert calls
    assert message.startswith("model.layers.2.self_attn.q_proj: ") and words in message
    assert not out.exists()
    assert compress_checkpoint(dense, recipe, out).blocks_resumed == 2


def test_memory_that_runs_out_elsewhere_names_the_block(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, 0

    def full(self: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 12:
            torch.empty(2**55)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", full)
        message = fails(RunError, dense, small_recipe, tmp_path / "out")
    assert message.startswith("model.layers.") and "out of memory" in message
    compress_checkpoint(dense, small_recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_the_command_says_that_memory_ran_out(
    llama: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        torch.empty(2**55)

    monkeypatch.setattr("halfweight.serving.inspect.inspect_checkpoint", full)
    result = cli("inspect", llama)
    assert result.code == 1
    assert "out of memory" in one_line(result)


def test_what_an_allocator_says_is_understood() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_cost_the_block_at_work_at_most(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "kill_resume.py"
    flags = ["--kills", "3", "--blocks", "3", "--json", str(tmp_path / "kills.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, timeout=400, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "kills.json")
    assert result["kills"] == 3 and result["finished"] >= 1
    for one in result["rounds"]:
        assert one.get("blocks_resumed", one["blocks_before"]) == one["blocks_before"]


# --- impatience ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_ctrl_c_twice_is_one_line_and_resumes(
    gap: float, dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["compress", dense, "--recipe", whole / "recipe.yaml", "--out", out]
    child = load_script("kill_resume").start([*map(str, arguments)], log)
    while len(read_lines(partial_of(out) / writer.JOURNAL)) < 2:  # a fingerprint and a block
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    time.sleep(gap)
    os.kill(child, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text(encoding="utf-8")
    assert code == 130, said
    assert "Traceback" not in said and "Exception ignored" not in said
    assert said.count("error: interrupted") == 1
    assert not out.exists()
    assert 0 < compress_checkpoint(dense, small_recipe, out).blocks_resumed < BLOCKS
    assert contents(out) == contents(whole)


def test_a_second_ctrl_c_does_not_tear_the_line_apart(cli: Cli, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    say = halfweight.cli.output.fail

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def impatient(message: str, code: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        say(message, code)

    try:
        monkeypatch.setattr("halfweight.serving.inspect.inspect_checkpoint", interrupted)
        monkeypatch.setattr(halfweight.cli.output, "fail", impatient)
        result = cli("inspect", llama)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130
    assert "interrupted" in one_line(result)
