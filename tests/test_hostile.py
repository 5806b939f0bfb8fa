"""Artifacts that are damaged or hostile are refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from artifacts import LOADERS, Q, shards
from halfweight.serving.checkpoint import INDEX_NAME

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
    "gigantic groups": (
        edit_config(named(pattern="dense", density=1.0, integers={"group_size": 2**63, "along": "outputs"})),
        "group_size",
    ),
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
