"""A compressed folder loads into what was compressed, survives saving, and is refused when it is damaged."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfweight
from artifacts import IDS, Q, assert_same, run_python, shards, stored
from halfweight.serving.checkpoint import INDEX_NAME, Checkpoint
from halfweight.triton_kernels.formats import two_four
from tiny import ARCHITECTURES

# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_loaders_equal_the_dense_model_with_the_unpacked_weights(
    architecture: str, make_model: Callable[..., Path], small_recipe: halfweight.Recipe, tmp_path: Path
) -> None:
    folder, out = make_model(architecture), tmp_path / "out"
    halfweight.compress_checkpoint(folder, small_recipe, out)
    loaded = halfweight.load(out, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = stored(out)
    config = Checkpoint(out).artifact
    assert config is not None
    assert len(config.linears) > 0
    for name in config.linears:
        weight = two_four.unpack(tensors[f"{name}.values"], tensors[f"{name}.meta"])
        linear = dense.get_submodule(name)
        assert weight.shape == linear.weight.shape
        assert not torch.equal(weight.float(), linear.weight)
        linear.weight.data.copy_(weight)
    with torch.no_grad():
        logits = loaded(IDS).logits
        assert torch.equal(logits, plain(IDS).logits)
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not loaded.training
    assert not any(p.requires_grad for m in loaded.modules() if hasattr(m, "meta") for p in m.parameters(recurse=False))


def test_auto_dtype_is_float32_on_a_cpu_and_the_stored_one_in_transformers(artifact: Path) -> None:
    assert halfweight.load(artifact, device="cpu").dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(artifact, dtype="auto").dtype == torch.bfloat16


def test_sharded_and_single_file_artifacts_hold_the_same(artifact: Path, sharded: Path) -> None:
    assert_same(stored(artifact), stored(sharded))
    with torch.no_grad():
        logits = [halfweight.load(folder, dtype="float32")(IDS).logits for folder in (artifact, sharded)]
    assert torch.equal(*logits)


def test_generation_runs_on_both_loaders(artifact: Path) -> None:
    tokens = [
        model.generate(IDS[:, :4], attention_mask=torch.ones_like(IDS[:, :4]), max_new_tokens=6, do_sample=False)
        for model in (halfweight.load(artifact), AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32))
    ]
    assert torch.equal(*tokens)


# --- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("shard_size", ["1GB", "12KB"])
def test_save_and_load_round_trips_bit_by_bit(
    architecture: str,
    shard_size: str,
    make_model: Callable[..., Path],
    small_recipe: halfweight.Recipe,
    tmp_path: Path,
) -> None:
    halfweight.compress_checkpoint(make_model(architecture), small_recipe, tmp_path / "out")
    first = halfweight.load(tmp_path / "out", dtype="bfloat16")
    first.save_pretrained(tmp_path / "one", max_shard_size=shard_size)
    second = halfweight.load(tmp_path / "one", dtype="bfloat16")
    second.save_pretrained(tmp_path / "two", max_shard_size=shard_size)
    assert_same(first.state_dict(), second.state_dict())
    assert_same(stored(tmp_path / "one"), stored(tmp_path / "two"))
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {file.name for file in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("shard_size", ["1GB", "12KB"])
def test_a_saved_folder_keeps_the_artifacts_tensors_config_and_file_names(
    shard_size: str, artifact: Path, tmp_path: Path
) -> None:
    halfweight.load(artifact, dtype="bfloat16").save_pretrained(tmp_path, max_shard_size=shard_size)
    assert_same(stored(artifact), stored(tmp_path))
    weights = [file.name for file in tmp_path.iterdir() if "safetensors" in file.name]
    assert INDEX_NAME in weights
    assert all(name.startswith("halfweight") for name in weights)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in shards(tmp_path)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path).values())
    before, after = (json.loads((d / "config.json").read_text(encoding="utf-8")) for d in (artifact, tmp_path))
    assert after["quantization_config"] == before["quantization_config"]
    # Naming the weights in the config would let transformers find them without halfweight.
    assert "transformers_weights" not in before
    assert "transformers_weights" not in after


def test_saving_into_the_loaded_folder_changes_nothing(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    before = stored(folder)
    halfweight.load(folder, dtype="bfloat16").save_pretrained(folder)  # one shard where there were several
    assert len(shards(folder)) == 1
    assert_same(before, stored(folder))
    halfweight.load(folder)


def test_a_copy_of_a_model_saves_itself(artifact: Path, tmp_path: Path) -> None:
    model = halfweight.load(artifact, dtype="bfloat16")
    duplicate = copy.deepcopy(model)
    duplicate.get_submodule(Q).values.zero_()
    duplicate.save_pretrained(tmp_path)
    assert not stored(tmp_path)[f"{Q}.values"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_leave_the_metadata_alone(dtype: torch.dtype, artifact: Path, tmp_path: Path) -> None:
    original = stored(artifact)
    for model in (halfweight.load(artifact, dtype=dtype), halfweight.load(artifact).to(dtype)):
        state = model.state_dict()
        for name, tensor in original.items():
            expected = tensor if name.endswith(".meta") else tensor.to(dtype)
            assert state[name].dtype == expected.dtype, name
            assert torch.equal(state[name], expected), name
    model.save_pretrained(tmp_path)
    assert_same(stored(tmp_path), state)
    assert_same(halfweight.load(tmp_path, dtype=dtype).state_dict(), state)


# --- without halfweight, and import order --------------------------------------------------------------------------

_WITHOUT = """
import json, sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "halfweight":
            raise ImportError("halfweight is hidden")

sys.meta_path.insert(0, Guard())
from transformers import AutoModelForCausalLM
result = []
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        result.append("loaded")
    except OSError as error:
        result.append("OSError")
    except Exception as error:
        result.append(repr(error))
assert not [name for name in sys.modules if name.partition(".")[0] == "halfweight"]
print(json.dumps(result))
"""


def test_without_halfweight_transformers_refuses_every_artifact(artifact: Path, sharded: Path, tmp_path: Path) -> None:
    halfweight.load(artifact).save_pretrained(tmp_path)
    assert run_python(_WITHOUT, artifact, sharded, tmp_path, isolated=True) == ["OSError"] * 3


_IMPORT_FIRST = """
import sys
import halfweight
heavy = [name for name in ("torch", "transformers", "numpy", "pydantic") if name in sys.modules]
finders = len(sys.meta_path)
import importlib, json
for _ in range(3):
    importlib.reload(halfweight)
again = len(sys.meta_path)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps([heavy, again - finders, type(model.get_submodule(sys.argv[2])).__name__]))
"""

_IMPORT_LAST = """
import json
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as methods
before = "halfweight" in methods
import halfweight
quantizer = methods["halfweight"]
halfweight._register_with_transformers()
print(json.dumps([before, quantizer is methods["halfweight"]]))
"""


def test_import_is_light_and_registers_once_when_transformers_comes_later(artifact: Path) -> None:
    assert run_python(_IMPORT_FIRST, artifact, Q) == [[], 0, "CompressedLinear"]


def test_import_registers_when_transformers_came_first() -> None:
    assert run_python(_IMPORT_LAST) == [False, True]


def test_registration_is_idempotent() -> None:
    from transformers.quantizers import auto

    before = (auto.AUTO_QUANTIZER_MAPPING["halfweight"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["halfweight"])
    halfweight._register_with_transformers()
    assert before == (auto.AUTO_QUANTIZER_MAPPING["halfweight"], auto.AUTO_QUANTIZATION_CONFIG_MAPPING["halfweight"])
