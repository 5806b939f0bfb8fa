"""The compression driver: what it leaves on disk, how it resumes, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress import driver, writer
from halfweight.compress.report import CompressionReport, OnProgress, Progress
from halfweight.serving.checkpoint import INDEX_NAME, Checkpoint

BLOCKS = 4
Q1 = "model.layers.1.self_attn.q_proj"


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a run."""


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama of four blocks."""
    return make_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(dense: Path, small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = compress_checkpoint(dense, small_recipe, out)
    assert report.blocks_resumed == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds timings."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != "report.json"}


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


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_the_artifact_holds_these_files_and_nothing_else(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    source, out = tmp_path / "dense", tmp_path / "nested" / "out"
    shutil.copytree(dense, source)
    (source / "modeling_llama.py").write_text("raise SystemExit\n")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (source / "LICENSE").write_text("a licence\n")
    report = compress_checkpoint(source, small_recipe, out)
    copied = {f.name for f in source.iterdir() if f.suffix in (".json", "") and f.name != "config.json"}
    written = {"config.json", "recipe.yaml", "report.json", INDEX_NAME, "halfweight-00001-of-00001.safetensors"}
    assert {f.name for f in out.iterdir()} == copied | written
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert CompressionReport.model_validate_json((out / "report.json").read_text(encoding="utf-8")) == report
    assert Recipe.load(out / "recipe.yaml") == small_recipe
    index = json.loads((out / INDEX_NAME).read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(load_file(out / "halfweight-00001-of-00001.safetensors"))


def test_the_config_is_the_dense_one_and_plain_json(dense: Path, whole: Path) -> None:
    before, after = (json.loads((d / "config.json").read_text(encoding="utf-8")) for d in (dense, whole))
    section = after.pop("quantization_config")
    assert after == before
    linears = section.pop("linears")
    assert section == {"quant_method": "halfweight", "format_version": 1}
    assert len(linears) == 7 * BLOCKS
    assert list(linears.values()) == [{"pattern": "2:4", "density": 0.5}] * len(linears)


def test_the_tokenizer_comes_along(dense: Path, whole: Path) -> None:
    ids = [halfweight.load_tokenizer(folder)("the of and")["input_ids"] for folder in (dense, whole)]
    assert ids[0] == ids[1]


def test_the_report_counts_and_verifies(whole: Path) -> None:
    report = CompressionReport.model_validate_json((whole / "report.json").read_text(encoding="utf-8"))
    assert (report.blocks, report.blocks_resumed) == (BLOCKS, 0)
    assert report.calibration_tokens == 8 * 32
    assert report.verification.relative_difference <= report.verification.tolerance
    assert report.bytes == sum(t.nbytes for t in load_file(whole / "halfweight-00001-of-00001.safetensors").values())
    assert [layer.density for layer in report.layers] == [0.5] * 7 * BLOCKS
    assert all(0 < layer.error < 1 for layer in report.layers)
    assert report.dev.tokens == report.dev.windows * (report.dev.seqlen - 1)
    assert report.seconds > 0
    assert report.peak_rss_gb > 0.05


def test_two_runs_are_byte_identical(dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    compress_checkpoint(dense, small_recipe, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)


def test_sharded_dense_weights_give_the_same_artifact(
    make_model: Callable[..., Path], whole: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    sharded = make_model("llama", num_hidden_layers=BLOCKS, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    compress_checkpoint(sharded, small_recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_large_artifacts_are_sharded(
    dense: Path, whole: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_SHARD_BYTES", 20_000)
    compress_checkpoint(dense, small_recipe, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in files)
    tensors = {name: tensor for f in files for name, tensor in load_file(f).items()}
    single = load_file(whole / "halfweight-00001-of-00001.safetensors")
    assert set(tensors) == set(single)
    assert all(torch.equal(tensors[name], single[name]) for name in single)
    halfweight.load(tmp_path / "out")


def test_other_patterns_are_stored_dense_with_measured_density(dense: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = parsed(
        text_file,
        {"pass": "wanda", "pattern": "4:8", "targets": ["*self_attn.*"]},
        {"pass": "magnitude", "pattern": "unstructured", "density": 0.3, "targets": ["*mlp.*"]},
    )
    compress_checkpoint(dense, recipe, out)
    inspection = halfweight.inspect_checkpoint(out)
    assert len(inspection.layers) == 7 * BLOCKS
    model = halfweight.load(out)
    for layer in inspection.layers:
        weight = model.get_submodule(layer.name).weight
        assert tuple(weight.shape) == layer.shape
        assert layer.density == pytest.approx(float((weight != 0).float().mean()))
        assert layer.bits == 16
        assert layer.numbers == "bfloat16"
        if "self_attn" in layer.name:
            assert (layer.pattern, layer.density) == ("4:8", 0.5)
            assert int((weight.unflatten(1, (-1, 8)) != 0).sum(-1).max()) == 4
        else:
            k = layer.shape[1]
            assert (layer.pattern, layer.density) == ("unstructured", pytest.approx(round(0.3 * k) / k))
            assert set((weight != 0).sum(1).tolist()) == {round(0.3 * k)}
    assert inspection.effective_bits == 16


@pytest.mark.parametrize(
    "architecture, dtype, changes, stage",
    [
        ("llama", torch.bfloat16, {}, {}),
        ("llama", torch.float32, {"intermediate_size": 68}, {"ignore": ["down_proj"]}),
        ("llama", torch.bfloat16, {"intermediate_size": 68}, {"targets": ["down_proj"]}),
        ("qwen2", torch.bfloat16, {}, {"targets": ["*self_attn.*"]}),
        ("gpt_neox", torch.float16, {}, {"pattern": "1:4"}),
        ("opt", torch.bfloat16, {}, {}),
    ],
)
def test_planned_bits_are_the_bits_on_disk(
    architecture: str,
    dtype: torch.dtype,
    changes: dict[str, Any],
    stage: dict[str, Any],
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = make_model(architecture, dtype, **changes)
    recipe = parsed(text_file, {"pass": "magnitude", "pattern": "2:4", **stage})
    planned = halfweight.plan(folder, recipe)
    report = compress_checkpoint(folder, recipe, tmp_path / "out")
    inspection = halfweight.inspect_checkpoint(tmp_path / "out")
    assert planned.effective_bits == pytest.approx(inspection.effective_bits, rel=1e-12)
    assert planned.effective_bits_model == pytest.approx(inspection.effective_bits_model, rel=1e-12)
    assert report.effective_bits == inspection.effective_bits
    assert {layer.name: layer.bits_after for layer in planned.layers} == {
        layer.name: pytest.approx(layer.bits) for layer in inspection.layers
    }
    total = sum(t.numel() for f in folder.glob("*.safetensors") for t in load_file(f).values())
    assert planned.parameters == total
    bits = 8 * sum(t.nbytes for f in (tmp_path / "out").glob("halfweight-*") for t in load_file(f).values())
    assert inspection.effective_bits_model == pytest.approx(bits / total)


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


def python(code: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


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


# --- failures ------------------------------------------------------------------------------------------------------


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


# --- memory --------------------------------------------------------------------------------------------------------

# ru_maxrss would start at the size of the process that started this one; VmHWM is this process's own.
_PEAK = """
import gc, json, sys
import torch
import halfweight

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
recipe = halfweight.Recipe.load(sys.argv[1])
halfweight.compress_checkpoint(sys.argv[2], recipe, sys.argv[3])
gc.collect()
before = status("VmRSS:")
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
except OSError:
    print("null")
    sys.exit()
reset = status("VmHWM:")
halfweight.compress_checkpoint(sys.argv[4], recipe, sys.argv[5])
print(json.dumps([before, reset, status("VmHWM:")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_number_of_blocks(
    whole: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    hidden, inner, blocks = 256, 1024, 24
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_key_value_heads": 4}
    # Two blocks first: imports, thread pools and the kernels for these shapes are then in the baseline.
    small, big = (make_model("llama", num_hidden_layers=count, **sizes) for count in (2, blocks))
    folders = (small, tmp_path / "small", big, tmp_path / "big")
    # A fixed threshold makes glibc give every freed tensor back, so that resident memory is what lives.
    done = python(_PEAK, whole / "recipe.yaml", *folders, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    if measured is None:
        pytest.skip("this system cannot reset a process's peak memory")
    before, reset, peak = measured
    assert reset - before < 2**22
    block = 4 * (4 * hidden * hidden + 3 * hidden * inner)  # computed in float32
    outside = 4 * 2 * 64 * hidden
    windows = 4 * 10 * 32 * hidden  # eight calibration windows and two dev streams
    largest = 4 * hidden * inner
    allowance = windows + 3 * largest + 2**23  # solver copies of one weight; buffers for reading and writing
    assert peak - before < 2 * block + outside + allowance
    assert peak - before < blocks * block / 4


def test_blocks_without_targets_pass_through(llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = halfweight.Recipe.parse(
        {
            "calibration": {"data": str(text_file), "samples": 2, "seqlen": 16},
            "stages": [{"pass": "sparsegpt", "targets": ["*.layers.1.*"]}],
        }
    )
    report = halfweight.compress_checkpoint(llama, recipe, tmp_path / "out")
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    dense, compressed = Checkpoint(llama), Checkpoint(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(dense.read(name), compressed.read(name))
    assert "model.layers.1.mlp.down_proj.values" in compressed.tensors
