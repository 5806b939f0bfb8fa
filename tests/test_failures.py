"""How a compression run fails: one line, and nothing that looks whole."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress import driver
from runs import BLOCKS, Q1, change_tensor, contents, fails, parsed, partial_of, python


def test_a_verification_mismatch_publishes_nothing(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = 0
    write = driver.writer.write_part

    def corrupt(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal parts
        parts += 1
        wrong = {name: 1.5 * t if name.endswith("values") and parts == 2 else t for name, t in tensors.items()}
        write(path, wrong)

    with monkeypatch.context() as patch:
        patch.setattr(driver.writer, "write_part", corrupt)
        message = fails(RunError, dense, small_recipe, tmp_path / "out")
    assert "not published" in message
    assert [f.name for f in tmp_path.iterdir()] == ["out.partial"]
    # What was written wrongly must not come back through the journal.
    compress_checkpoint(dense, small_recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


_LIMITED = """
import json, os, resource, sys
import torch
import halfweight.cli

torch.set_num_threads(1)
model, recipe, out = sys.argv[1:4]
sys.argv = ["halfweight", "compress", model, "--recipe", recipe, "--out", out]
result = []
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (4000, 16000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        halfweight.cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    result.append([code, sorted(os.listdir(os.path.dirname(out))), len(os.listdir(out + ".partial"))])
print(json.dumps(result))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_one_line_and_resumes(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    sizes = {f.name: f.stat().st_size for f in whole.glob("halfweight-*")}
    assert max(sizes.values()) > 16000
    done = python(_LIMITED, dense, whole / "recipe.yaml", out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert all(str(partial_of(out)) in line and "resumes" in line for line in errors)
    (code_early, early, _), (code_late, late, _) = json.loads(done.stdout.splitlines()[-1])
    assert (code_early, code_late) == (1, 1)
    assert early == late == ["out.partial"]
    with pytest.raises(InputError):
        halfweight.load(partial_of(out))
    # The parts were small enough for the second limit; only the joined shard was not.
    assert compress_checkpoint(dense, small_recipe, out).blocks_resumed == BLOCKS
    assert contents(out) == contents(whole)


def test_too_little_space_is_said_before_the_work(
    dense: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    message = fails(InputError, dense, small_recipe, tmp_path / "out")
    assert "free" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["file", "proc"])
def test_a_place_that_cannot_be_written_is_refused(
    where: str, dense: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    if where == "proc" and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    (tmp_path / "file").write_text("a file")
    out = Path("/proc/halfweight/out") if where == "proc" else tmp_path / "file" / "out"
    assert str(out) in fails(InputError, dense, small_recipe, out)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_name_their_module(
    method: str, bad: float, dense: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    change_tensor(model, f"{Q1}.weight", lambda t: t[3, 5].fill_(bad))
    message = fails(RunError, model, parsed(text_file, {"pass": method}), tmp_path / "out")
    assert Q1 in message
    assert not (tmp_path / "out").exists()


def test_damaged_weights_that_no_stage_touches_name_the_module_behind_them(
    dense: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    change_tensor(model, "model.embed_tokens.weight", lambda t: t.fill_(float("nan")))
    message = fails(RunError, model, parsed(text_file, {"pass": "wanda"}), tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj" in message
    assert "not finite" in message


def test_inputs_that_are_always_zero_name_the_module_and_the_tokens(
    dense: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    change_tensor(model, "model.layers.1.input_layernorm.weight", lambda t: t.zero_())
    message = fails(RunError, model, parsed(text_file, {"pass": "sparsegpt"}), tmp_path / "out")
    assert Q1 in message
    assert "no non-zero input in 128 calibration tokens" in message


def test_some_inputs_that_are_always_zero_do_no_harm(dense: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    change_tensor(model, "model.layers.1.input_layernorm.weight", lambda t: t[:9].zero_())
    for method in ("sparsegpt", "admm"):
        report = compress_checkpoint(model, parsed(text_file, {"pass": method}), tmp_path / method)
        assert all(0 <= layer.error < 1 for layer in report.layers)


def test_a_module_that_calibration_never_reaches_is_named(
    dense: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def without_up(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)))

    monkeypatch.setattr(LlamaMLP, "forward", without_up)
    message = fails(RunError, dense, small_recipe, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in message
    assert "no calibration tokens" in message
