"""What a compression run leaves on disk, and the memory it takes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halfweight
from halfweight import Recipe, compress_checkpoint
from halfweight.compress import driver
from halfweight.compress.report import CompressionReport
from halfweight.serving.checkpoint import INDEX_NAME, Checkpoint
from runs import BLOCKS, contents, parsed, python

# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_the_artifact_holds_these_files_and_nothing_else(dense: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    source, out = tmp_path / "dense", tmp_path / "nested" / "out"
    shutil.copytree(dense, source)
    (source / "modeling_llama.py").write_text("raise SystemExit\n")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (source / "LICENSE").write_text("a licence\n")
    report = compress_checkpoint(source, small_recipe, out)
    copied = {f.name for f in source.iterdir() if f.suffix in (".json", "") and f.name != "config.json"}
    written = {"config.json", "recipe.yaml", "report.json", "SHA256SUMS", INDEX_NAME}
    written.add("halfweight-00001-of-00001.safetensors")
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
    monkeypatch.setattr(driver.writer, "SHARD_BYTES", 20_000)
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
    inspection = halfweight.inspect_checkpoint(out, device="cpu")
    assert len(inspection.layers) == 7 * BLOCKS
    assert {layer.backend for layer in inspection.layers} == {"dense"}
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
