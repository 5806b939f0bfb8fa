"""A compressed folder loads into what was compressed, survives saving, and is refused when it is damaged."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.serving.checkpoint import INDEX_NAME, Checkpoint
from halfweight.triton_kernels.formats import two_four
from tiny import ARCHITECTURES

IDS = torch.arange(3, 27)[None]
Q = "model.layers.0.self_attn.q_proj"

LOADERS: dict[str, Callable[[Path], Any]] = {
    "load": halfweight.load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}


@pytest.fixture(scope="module")
def artifact(llama: Path, small_recipe: halfweight.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama at 2:4, one shard."""
    folder = tmp_path_factory.mktemp("artifact") / "llama-2of4"
    halfweight.compress_checkpoint(llama, small_recipe, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same artifact, saved again in several shards."""
    folder = tmp_path_factory.mktemp("sharded") / "llama-2of4"
    halfweight.load(artifact, dtype="bfloat16").save_pretrained(folder, max_shard_size="12KB")
    assert len(shards(folder)) > 1
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the folder's index names."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    files = {name: load_file(folder / name) for name in sorted(set(index["weight_map"].values()))}
    assert {k for tensors in files.values() for k in tensors} == set(index["weight_map"])
    return {tensor: files[name][tensor] for tensor, name in index["weight_map"].items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a[name], b[name])]
        assert torch.equal(*bits), name


def run_python(code: str, *arguments: str | Path, isolated: bool = False) -> Any:
    """Run `code` in a fresh interpreter (`isolated`: site-packages only) and parse the JSON on its last line."""
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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


# --- hostile artifacts ---------------------------------------------------------------------------------------------
# Each case damages a copy of the sharded artifact; both loaders must refuse it with one line that says `words`.


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrite the shard that holds Q after `change` of its tensors; index entries are left as they are."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        file = folder / index["weight_map"][f"{Q}.values"]
        assert index["weight_map"][f"{Q}.meta"] == file.name
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite config.json after `change` of its quantization_config."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return damage


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace the last shard's bytes."""

    def damage(folder: Path) -> None:
        file = shards(folder)[-1]
        file.write_bytes(change(file.read_bytes()))

    return damage


def edit_header(change: Callable[[dict[str, Any], list[str]], Any]) -> Callable[[Path], None]:
    """Rewrite the last shard's header after `change(header, tensor names in file order)`."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        names = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        change(header, names)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return edit_bytes(rewrite)


def edit_index(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        change(folder, index)
        (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")

    return damage


def move_outside(prefix: Callable[[Path], str]) -> Callable[[Path], None]:
    """Put the last shard beside the folder, and name it there in the index."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        last = shards(folder)[-1]
        outside = folder.parent / "outside"
        outside.mkdir()
        last.rename(outside / last.name)
        index["weight_map"] = {
            tensor: prefix(outside) + name if name == last.name else name
            for tensor, name in index["weight_map"].items()
        }

    return edit_index(change)


def overlap(header: dict[str, Any], names: list[str]) -> None:
    """The second tensor reads the first one's bytes."""
    begin, end = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [0, end - begin]


def before_the_start(header: dict[str, Any], names: list[str]) -> None:
    begin, end = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [begin - end, 0]


def longer(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["data_offsets"][1] += 2


def past_the_end(header: dict[str, Any], names: list[str]) -> None:
    header[names[-1]]["shape"][0] += 1000
    begin, end = header[names[-1]]["data_offsets"]
    header[names[-1]]["data_offsets"] = [begin + (end - begin) * 1000, end + (end - begin) * 1000]
    header[names[-1]]["shape"][0] -= 1000


def named(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change of quantization_config: set these keys of Q's scheme."""
    return lambda section: section["linears"][Q].update(fields)


def shape_of(index: int, shape: Any) -> Callable[[dict[str, Any], list[str]], Any]:
    return lambda header, names: header[names[index]].update(shape=shape)


SCHEME = {"pattern": "2:4", "density": 0.5}

HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "positions out of order": (edit_tensors(lambda t: t[f"{Q}.meta"].fill_(0b0001)), "out of order"),
    "one position twice": (edit_tensors(lambda t: t[f"{Q}.meta"].fill_(0b01010101)), "out of order"),
    "meta too narrow": (edit_tensors(lambda t: t.update({f"{Q}.meta": t[f"{Q}.meta"][:, :-1].clone()})), "shape"),
    "meta flat": (edit_tensors(lambda t: t.update({f"{Q}.meta": t[f"{Q}.meta"].flatten()})), "shape"),
    "values too short": (edit_tensors(lambda t: t.update({f"{Q}.values": t[f"{Q}.values"][:-1].clone()})), "shape"),
    "values of integers": (edit_tensors(lambda t: t.update({f"{Q}.values": t[f"{Q}.values"].short()})), "floating"),
    "wide integer meta": (edit_tensors(lambda t: t.update({f"{Q}.meta": t[f"{Q}.meta"].int()})), "uint8"),
    "floating meta": (edit_tensors(lambda t: t.update({f"{Q}.meta": t[f"{Q}.meta"].half()})), "uint8"),
    "missing meta": (edit_tensors(lambda t: t.pop(f"{Q}.meta")), "missing"),
    "missing values": (edit_tensors(lambda t: t.pop(f"{Q}.values")), "missing"),
    "newer format": (edit_config(lambda c: c.update(format_version=2)), "format_version 2"),
    "no format": (edit_config(lambda c: c.pop("format_version")), "format_version None"),
    "text for a format": (edit_config(lambda c: c.update(format_version="1")), "format_version '1'"),
    "true for a format": (edit_config(lambda c: c.update(format_version=True)), "format_version True"),
    "unknown key": (edit_config(lambda c: c.update(bogus=1)), "bogus"),
    "unknown key of a linear": (edit_config(named(bogus=1)), "bogus"),
    "impossible pattern": (edit_config(named(pattern="9:4")), "9:4"),
    "unknown pattern": (edit_config(named(pattern="x\ny")), "pattern"),
    "density above one": (edit_config(named(density=1.5)), "density"),
    "density nan": (edit_config(named(density=float("nan"))), "density"),
    "linears not a mapping": (edit_config(lambda c: c.update(linears=[Q])), "linears"),
    "no linears": (edit_config(lambda c: c.pop("linears")), "linears"),
    "no such module": (edit_config(lambda c: c["linears"].update({"model.nope": SCHEME})), "model.nope"),
    "not a linear": (edit_config(lambda c: c["linears"].update({"model.norm": SCHEME})), "not a linear"),
    "the model as a linear": (edit_config(lambda c: c["linears"].update({"": SCHEME})), "not a linear"),
    "unlisted linear": (edit_config(lambda c: c["linears"].pop(Q)), "missing"),
    "relative path in the index": (move_outside(lambda folder: "../outside/"), "outside the folder"),
    "absolute path in the index": (move_outside(lambda folder: f"{folder}/"), "outside the folder"),
    "index without a map": (edit_index(lambda folder, index: index.pop("weight_map")), "weight_map"),
    "index of numbers": (edit_index(lambda folder, index: index.update(weight_map={"lm_head.weight": 3})), ""),
    "index not JSON": (lambda folder: (folder / INDEX_NAME).write_text("{"), "JSON"),
    "index a list": (lambda folder: (folder / INDEX_NAME).write_text("[]"), "JSON object"),
    "no index": (lambda folder: (folder / INDEX_NAME).unlink(), INDEX_NAME),
    "missing shard": (lambda folder: shards(folder)[-1].unlink(), "missing"),
    "truncated shard": (edit_bytes(lambda data: data[:-7]), "truncated"),
    "truncated header": (edit_bytes(lambda data: data[:40]), "truncated"),
    "empty shard": (edit_bytes(lambda data: b""), "truncated"),
    "huge header": (edit_bytes(lambda data: (2**62).to_bytes(8, "little") + data[8:]), "safetensors"),
    "largest header": (edit_bytes(lambda data: b"\xff" * 8 + data[8:]), "safetensors"),
    "header not JSON": (edit_bytes(lambda data: data[:8] + b"x" * (len(data) - 8)), "safetensors"),
    "header nested too deep": (edit_bytes(lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5), "safetensors"),
    "header a list": (edit_bytes(lambda data: (2).to_bytes(8, "little") + b"[]"), "safetensors"),
    "offsets too long": (edit_header(longer), "contradicts"),
    "offsets overlap": (edit_header(overlap), "contradicts"),
    "offsets before the start": (edit_header(before_the_start), "contradicts"),
    "offsets past the end": (edit_header(past_the_end), "truncated"),
    "gigantic shape": (edit_header(shape_of(0, [2**40, 2**40])), "contradicts"),
    "negative shape": (edit_header(shape_of(0, [-32, -32])), "contradicts"),
    "shape of text": (edit_header(shape_of(0, "ab")), "safetensors"),
    "unknown dtype": (edit_header(lambda header, names: header[names[0]].update(dtype="F4")), "dtype"),
    "entry not a mapping": (edit_header(lambda header, names: header.update({names[0]: [1]})), "safetensors"),
    "no offsets": (edit_header(lambda header, names: header[names[0]].pop("data_offsets")), "safetensors"),
}


def refused(loader: str, folder: Path) -> str:
    """The one line of InputError with which `loader` refuses `folder`."""
    with pytest.raises(halfweight.InputError) as caught:
        LOADERS[loader](folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_artifacts_are_refused_in_one_line(case: str, loader: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = HOSTILE[case]
    folder = tmp_path / "artifact"
    shutil.copytree(sharded, folder)
    damage(folder)
    assert words in refused(loader, folder)


CONFIGS = {
    "not JSON": b"{nope",
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe",
    "nested too deep": b"[" * 100_000,
    "a list for the method": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"],'
    b' "quantization_config": [1]}',
    "another method": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"],'
    b' "quantization_config": {"quant_method": "gptq", "bits": 4}}',
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_config_is_refused_in_one_line(case: str, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    (folder / "config.json").write_bytes(CONFIGS[case])
    assert str(folder) in refused("load", folder)
    # transformers reads the config before any plugin is asked; what matters is that no model comes back.
    with pytest.raises(Exception):  # noqa: B017
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_folder_or_config_is_one_line(artifact: Path, tmp_path: Path) -> None:
    assert "nowhere" in refused("load", tmp_path / "nowhere")
    assert "config.json" in refused("load", tmp_path)
