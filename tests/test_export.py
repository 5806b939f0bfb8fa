"""Exports load in other libraries' own readers with the compressed weights, and deltas rebuild a fine-tune exactly."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from artifacts import IDS, assert_same
from commands import Cli, ok, one_line
from halfweight.serving.checkpoint import Checkpoint
from tiny import WORDS

BIG = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}  # inputs in whole groups of 32
CHANGES = {"gemma3_text": {"sliding_window_pattern": 6}}  # the only one GGUF has

STAGES: dict[str, dict[str, Any]] = {
    "2:4": {"pass": "wanda", "pattern": "2:4"},
    "w4": {"pass": "rtn", "bits": 4, "group_size": 32},
    "w4-sym": {"pass": "rtn", "bits": 4, "group_size": 32, "symmetric": True},
    "w8-sym": {"pass": "rtn", "bits": 8, "group_size": 64, "symmetric": True},
    "2:4-w4": {"pass": "gqsa", "pattern": "2:4", "bits": 4, "group_size": 32},
    "groups": {"pass": "gqsa", "pattern": "1x16", "density": 0.5},
    "low-rank": {"pass": "wanda", "pattern": "2:4", "low_rank": {"fraction": 0.1, "bits": 4}},
    "unstructured": {"pass": "magnitude", "pattern": "unstructured", "density": 0.5},
}


@pytest.fixture(scope="module")
def compress(
    make_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A tiny compressed checkpoint by stage and architecture, made once."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(kind: str, architecture: str = "llama", embeddings: bool = False) -> Path:
        key = (kind, architecture, embeddings)
        if key not in made:
            model = make_model(architecture, **BIG, **CHANGES.get(architecture, {}))
            byte_level_tokenizer().save_pretrained(model)
            recipe: dict[str, Any] = {
                "name": "test",
                "calibration": {"data": str(text_file), "samples": 4, "seqlen": 32},
                "stages": [STAGES[kind]],
            }
            if embeddings:
                recipe["embeddings"] = {"bits": 8, "group_size": 32}
            made[key] = tmp_path_factory.mktemp("export") / "artifact"
            halfweight.compress_checkpoint(model, halfweight.Recipe.parse(recipe), made[key])
        return made[key]

    return make


def byte_level_tokenizer() -> Any:
    """A byte-level BPE that was trained on WORDS, of at most 128 tokens beside the bytes it needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def logits(folder: Path) -> Tensor:
    """Logits of the compressed checkpoint at `folder` in fp32."""
    with torch.no_grad():
        result: Tensor = halfweight.load(folder, dtype="float32")(IDS).logits
    return result


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# --- dense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_dense_is_an_ordinary_checkpoint_with_the_compressed_weights(
    kind: str, compress: Callable[..., Path], tmp_path: Path
) -> None:
    report = halfweight.export_checkpoint(compress(kind), "dense", tmp_path / "dense")
    checkpoint = Checkpoint(tmp_path / "dense")
    assert "quantization_config" not in checkpoint.config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        difference = relative(plain(IDS).logits, logits(compress(kind)))
    assert difference <= (1e-6 if kind in ("2:4", "unstructured") else 2e-2)  # the others round to bf16
    if kind == "2:4":
        assert float((plain.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())
    assert any("zeros" in line for line in report.statement)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "gpt_neox"])
def test_dense_keeps_names_ties_and_integer_embeddings(
    architecture: str, compress: Callable[..., Path], tmp_path: Path
) -> None:
    folder = compress("2:4", architecture, embeddings=architecture == "qwen2")
    halfweight.export_checkpoint(folder, "dense", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        assert relative(plain(IDS).logits, logits(folder)) <= 5e-3
    stored = Checkpoint(tmp_path / "dense").tensors
    dense = Checkpoint(tmp_path / "dense")
    assert not any(name.endswith((".meta", ".values", ".codes")) for name in stored)
    assert all(len(dense.info(name).shape) <= 2 for name in stored)


# --- compressed-tensors --------------------------------------------------------------------------------------------


def unpack_words(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes of compressed-tensors' int32 words, read bit by bit."""
    words = packed.numpy().astype("int64") & 0xFFFFFFFF
    codes = [(words >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)]
    return torch.stack([torch.from_numpy(c) for c in codes], -1).flatten(-2)[..., :columns]


def dequantized(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack_words(tensors[f"{name}.weight_packed"], columns, bits).float()
    scales = tensors[f"{name}.weight_scale"].float()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = unpack_words(tensors[f"{name}.weight_zero_point"].T, rows, bits).T.float()
    size = columns // scales.shape[1]
    return (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)


@pytest.mark.parametrize(("kind", "exact"), [("w4", True), ("w8-sym", True), ("2:4-w4", True), ("groups", False)])
def test_w4_holds_the_codes_as_compressed_tensors_packs_them(
    kind: str, exact: bool, compress: Callable[..., Path], tmp_path: Path
) -> None:
    report = halfweight.export_checkpoint(compress(kind), "w4", tmp_path / "w4")
    tensors = {k: v for file in (tmp_path / "w4").glob("model-*.safetensors") for k, v in load_file(file).items()}
    config = json.loads((tmp_path / "w4" / "config.json").read_text())["quantization_config"]
    model = halfweight.load(compress(kind), dtype="float32")
    (group,) = config["config_groups"].values()
    assert config["ignore"] == ["lm_head"]
    assert group["targets"] == ["Linear"]
    linears = Checkpoint(compress(kind)).artifact
    assert linears is not None
    for name in linears.linears:
        want = model.get_submodule(name).dense_weight()
        got = dequantized(tensors, name, group["weights"]["num_bits"])
        assert relative(got, want) <= (2**-8 if exact else 0.15)
        if exact:
            assert torch.equal(got == 0, want == 0)
    assert f"{len(linears.linears)} linears {'keep their integer codes' if exact else 'are rounded anew'}" in str(
        report.statement
    )


def test_w4_loads_in_transformers_through_compressed_tensors(compress: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    # Symmetric: where transformers loads asymmetric codes, compressed-tensors 0.20 expects their zero points unpacked.
    halfweight.export_checkpoint(compress("w4-sym"), "w4", tmp_path / "w4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "w4", dtype=torch.float32)
    with torch.no_grad():
        assert relative(model(IDS).logits, logits(compress("w4-sym"))) <= 2e-2


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "architecture", "allowed"),
    [
        ("2:4", "llama", 1e-5),
        ("w4-sym", "llama", 1e-5),
        ("w4", "llama", 2e-3),
        ("w8-sym", "qwen2", 1e-5),
        ("groups", "llama", 3e-2),
        ("2:4", "gemma3_text", 1e-5),
    ],
)
def test_gguf_loads_in_transformers_own_reader(
    kind: str, architecture: str, allowed: float, compress: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    folder = compress(kind, architecture)
    report = halfweight.export_checkpoint(folder, "gguf", tmp_path / "model.gguf")
    assert report.bytes == (tmp_path / "model.gguf").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert relative(model(IDS).logits, logits(folder)) <= allowed


def test_gguf_tokens_types_and_merges_are_the_tokenizers(compress: Callable[..., Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    halfweight.export_checkpoint(compress("2:4"), "gguf", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokenizer = halfweight.load_tokenizer(compress("2:4"))
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == 128
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:4] == [3, 3, 3, 1]
    assert types[-1] == 5
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == tokenizer.eos_token_id


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_are_one_line_and_leave_nothing(
    compress: Callable[..., Path], make_model: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    folder = compress("2:4")
    out = tmp_path / "out"
    assert "did you mean 'dense'" in one_line(cli("export", folder, "--to", "dens", "--out", out))
    assert "ends in .gguf" in one_line(cli("export", folder, "--to", "gguf", "--out", out))
    assert "not a halfweight checkpoint" in one_line(cli("export", make_model(), "--to", "dense", "--out", out))
    neox = compress("2:4", "gpt_neox")
    assert "GGUF export knows" in one_line(cli("export", neox, "--to", "gguf", "--out", tmp_path / "o.gguf"))
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    assert "--overwrite" in one_line(cli("export", folder, "--to", "dense", "--out", out))
    ok(cli("export", folder, "--to", "dense", "--out", out, "--overwrite"))
    assert not (out / "mine").exists()


def test_a_damaged_checkpoint_is_refused_while_it_is_exported(
    compress: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(compress("2:4"), folder)
    file = next(folder.glob("halfweight-*.safetensors"))
    tensors = load_file(file)
    next(t for name, t in tensors.items() if name.endswith(".meta")).fill_(0xFF)
    save_file(tensors, file, {"format": "pt"})
    result = cli("export", folder, "--to", "dense", "--out", tmp_path / "out")
    assert result.code == 2
    assert "damaged or hostile" in result.err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


# --- deltas --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with some numbers changed: sparsely, wholly, by sign of zero only, and one tensor cast."""
    folder = tmp_path / "tuned"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if "layers.0" in name and name.endswith("proj.weight")]
    tensors[names[0]].view(-1)[::7] += 1
    tensors[names[1]] += 1
    tensors[names[2]].view(-1)[:2] = torch.tensor([0.0, -0.0])
    tensors[names[3]] = tensors[names[3]].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_delta_rebuilds_the_fine_tune_bit_by_bit(llama: Path, tuned: Path, cli: Cli, tmp_path: Path) -> None:
    again = tmp_path / "again"
    ok(cli("delta", llama, tuned, "--out", tmp_path / "delta"))
    ok(cli("delta", llama, tmp_path / "delta", "--apply", "--out", again))
    want, got = (Checkpoint(folder) for folder in (tuned, again))
    assert_same({n: want.read(n) for n in want.tensors}, {n: got.read(n) for n in got.tensors})
    assert json.loads((again / "config.json").read_text()) == json.loads((tuned / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(again)


def test_a_delta_stores_little_more_than_what_changed(llama: Path, tuned: Path, tmp_path: Path) -> None:
    report = halfweight.make_delta(llama, tuned, tmp_path / "delta")
    assert report.equal == report.tensors - 4
    stored = {k for f in (tmp_path / "delta").glob("*.safetensors") for k in load_file(f)}
    assert Counter(name.rpartition(".")[2] for name in stored) == {"bitmap": 2, "values": 2, "whole": 2}
    assert report.bytes < report.tuned_bytes / 3


def test_a_delta_between_compressed_checkpoints_keeps_their_form(artifact: Path, tmp_path: Path) -> None:
    halfweight.make_delta(artifact, artifact, tmp_path / "delta")
    halfweight.apply_delta(artifact, tmp_path / "delta", tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(logits(artifact), logits(tmp_path / "again"))


def test_a_delta_refuses_another_base_and_damage(llama: Path, tuned: Path, cli: Cli, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    halfweight.make_delta(llama, tuned, delta)
    assert "is not the base" in one_line(cli("delta", tuned, delta, "--apply", "--out", tmp_path / "again"))
    file = next(delta.glob("*.safetensors"))
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(".bitmap"):
            tensors[name][0] ^= 0xFF
    save_file(tensors, file, {"format": "pt"})
    result = cli("delta", llama, delta, "--apply", "--out", tmp_path / "again")
    assert result.code == 2
    assert "the delta is damaged" in result.err.splitlines()[-1]
    assert not (tmp_path / "again").exists()
