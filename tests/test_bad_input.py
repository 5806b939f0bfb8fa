"""Every bad input is one line on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Cli, one_line, process, read


@pytest.fixture(scope="module")
def broken(llama: Path, compressed: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bad models, texts and recipes, named for what is wrong with them."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    root = tmp_path_factory.mktemp("broken")

    def model(name: str) -> Path:
        shutil.copytree(llama, root / name)
        return root / name

    def configured(name: str, **changes: Any) -> None:
        file = model(name) / "config.json"
        file.write_text(json.dumps({**read(file), **changes}), encoding="utf-8")

    bert = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(bert).save_pretrained(root / "bert")
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    for name in ("bert", "t5"):
        for file in llama.glob("tokenizer*"):
            shutil.copy(file, root / name)
    pickled = model("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    cut = model("truncated") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 9)
    (model("garbage") / "model.safetensors").write_bytes(b"\xff" * 1000)
    lacking = model("lacking") / "model.safetensors"
    tensors = load_file(lacking)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking, {"format": "pt"})
    (model("config-not-json") / "config.json").write_text("{nope")
    (model("config-deep") / "config.json").write_text("[" * 100_000)
    configured("config-type", hidden_size="wide")
    configured("config-shape", hidden_size=48)
    configured("config-unknown", model_type="unheard-of")
    configured("config-code", model_type="unheard-of", auto_map={"AutoConfig": "code.Config"})
    configured("config-gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    (model("no-config") / "config.json").unlink()
    for file in model("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (model("bad-tokenizer") / "tokenizer.json").write_text("{")

    (root / "empty.txt").write_text(" \n\n")
    (root / "short.txt").write_text("the of and to in")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (root / "malformed.jsonl").write_text('{"text": "the"}\n\n{"text": \n')
    (root / "keyless.jsonl").write_text('{"text": "the"}\n{"body": "of"}\n')
    (root / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (root / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the"}\n' * 99)[:-9])
    damaged = bytearray(gzip.compress(bytes(range(256)) * 9))
    damaged[10:40] = b"\xff" * 30
    (root / "damaged.txt.gz").write_bytes(bytes(damaged))

    good = recipe.read_text(encoding="utf-8")
    (root / "typo.yaml").write_text(good.replace("pattern", "patern"))
    (root / "pass.yaml").write_text(good.replace("wanda", "wandaa"))
    (root / "target.yaml").write_text(good + "  targets: [q_prj]\n")
    (root / "regex.yaml").write_text(good + "  targets: ['re:(']\n")
    (root / "pattern.yaml").write_text(good.replace("2:4", "4:2"))
    (root / "fused.yaml").write_text(good + "  ignore: [q_proj]\n")
    (root / "not.yaml").write_text("stages: {")
    (root / "list.yaml").write_text("- 1\n")
    (root / "cycle.yaml").write_text("stages: &a [*a]\n")
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("mine")
    (root / "file").write_text("a file")
    return root


@dataclass(frozen=True)
class World:
    """What the cases below build their commands from."""

    bad: Path
    llama: Path
    compressed: Path
    recipe: Path
    text: Path
    out: Path

    def compress(self, model: Any = None, *flags: Any, recipe: Any = None, out: Any = None) -> list[Any]:
        model = self.llama if model is None else model
        return ["compress", model, "--recipe", recipe or self.recipe, "--out", out or self.out, *flags]

    def evaluate(self, *flags: Any) -> list[Any]:
        return ["eval", self.llama, "--text", self.text, *flags]


@pytest.fixture
def world(broken: Path, llama: Path, compressed: Path, recipe: Path, text_file: Path, tmp_path: Path) -> World:
    return World(broken, llama, compressed, recipe, text_file, tmp_path / "out")


Case = tuple[Callable[[World], list[Any]], tuple[str, ...]]

BAD_INPUT: dict[str, Case] = {
    # The command itself.
    "unknown verb": (lambda w: ["comprez"], ("comprez",)),
    "unknown flag": (lambda w: w.compress(None, "--bogus"), ("--bogus",)),
    "flag without a value": (lambda w: w.compress(None, "--samples"), ("--samples",)),
    "no --out": (lambda w: ["compress", w.llama], ("--out",)),
    "no model": (lambda w: ["eval"], ("model",)),
    "not a number": (lambda w: w.compress(None, "--samples", "many"), ("--samples",)),
    "out of range": (lambda w: w.compress(None, "--samples", "0"), ("--samples",)),
    # Models.
    "missing model": (lambda w: w.compress(w.bad / "nowhere"), ("nowhere",)),
    "missing model with markup": (lambda w: ["plan", "./[red]nowhere[/]"], ("[red]nowhere[/]",)),
    "missing model for inspect": (lambda w: ["inspect", w.bad / "nowhere"], ("nowhere",)),
    "empty model name": (lambda w: ["eval", ""], ("empty",)),
    "a file for a model": (lambda w: ["plan", w.text], ("is a file",)),
    "no config": (lambda w: w.compress(w.bad / "no-config"), ("config.json",)),
    "config not JSON": (lambda w: w.compress(w.bad / "config-not-json"), ("config.json",)),
    "config too deep": (lambda w: w.compress(w.bad / "config-deep"), ("config.json",)),
    "config with a wrong type": (lambda w: w.compress(w.bad / "config-type"), ("config-type", "config.json")),
    "config with a wrong type, eval": (
        lambda w: ["eval", w.bad / "config-type", "--text", w.text, "--seqlen", "32"],
        ("config-type",),
    ),
    "config of another shape, eval": (
        lambda w: ["eval", w.bad / "config-shape", "--text", w.text, "--seqlen", "32"],
        ("shape", "model.safetensors"),
    ),
    "unknown model type": (lambda w: w.compress(w.bad / "config-unknown"), ("unheard-of",)),
    "remote code": (lambda w: w.compress(w.bad / "config-code"), ("--trust-remote-code",)),
    "other quantization": (lambda w: w.compress(w.bad / "config-gptq"), ("gptq",)),
    "pickle only": (lambda w: w.compress(w.bad / "pickled"), ("pickle", "pytorch_model.bin", "safetensors")),
    "pickle only, eval": (lambda w: ["eval", w.bad / "pickled"], ("pickle",)),
    "pickle only, inspect": (lambda w: ["inspect", w.bad / "pickled"], ("safetensors",)),
    "truncated weights": (lambda w: w.compress(w.bad / "truncated"), ("truncated", "model.safetensors")),
    "truncated weights, plan": (lambda w: ["plan", w.bad / "truncated", "--recipe", w.recipe], ("truncated",)),
    "truncated weights, eval": (lambda w: ["eval", w.bad / "truncated"], ("truncated",)),
    "truncated weights, generate": (lambda w: ["generate", w.bad / "truncated", "--prompt", "the"], ("truncated",)),
    "truncated weights, inspect": (lambda w: ["inspect", w.bad / "truncated"], ("truncated",)),
    "garbage weights": (lambda w: w.compress(w.bad / "garbage"), ("model.safetensors",)),
    "missing tensor": (lambda w: w.compress(w.bad / "lacking"), ("model.layers.1.mlp.up_proj.weight", "missing")),
    "missing tensor, plan": (lambda w: ["plan", w.bad / "lacking", "--recipe", w.recipe], ("up_proj", "missing")),
    "missing tensor, eval": (
        lambda w: ["eval", w.bad / "lacking", "--text", w.text, "--seqlen", "32"],
        ("up_proj", "missing"),
    ),
    "missing tensor, generate": (
        lambda w: ["generate", w.bad / "lacking", "--prompt", "the"],
        ("up_proj", "missing"),
    ),
    "missing tensor, inspect": (lambda w: ["inspect", w.bad / "lacking"], ("up_proj", "missing")),
    "no tokenizer": (lambda w: w.compress(w.bad / "no-tokenizer"), ("tokenizer",)),
    "damaged tokenizer": (lambda w: ["eval", w.bad / "bad-tokenizer"], ("tokenizer",)),
    "masked model": (lambda w: w.compress(w.bad / "bert"), ("BertForMaskedLM", "causal")),
    "masked model, eval": (lambda w: ["eval", w.bad / "bert"], ("causal",)),
    "encoder-decoder": (lambda w: w.compress(w.bad / "t5"), ("T5ForConditionalGeneration", "causal")),
    "encoder-decoder, plan": (lambda w: ["plan", w.bad / "t5", "--recipe", w.recipe], ("causal",)),
    "compressed already": (lambda w: w.compress(w.compressed), ("compressed by halfweight already",)),
    "compressed already, plan": (
        lambda w: ["plan", w.compressed, "--recipe", w.recipe],
        ("compressed by halfweight already",),
    ),
    # Where to write.
    "non-empty out": (lambda w: w.compress(out=w.bad / "full"), ("full", "--overwrite")),
    "a file for out": (lambda w: w.compress(out=w.bad / "file"), ("file", "not a folder")),
    "out below a file": (lambda w: w.compress(out=w.bad / "file" / "out"), ("file", "cannot be written")),
    "out is the root": (lambda w: w.compress(None, "--overwrite", out="/"), ("/",)),
    # Device and dtype.
    "bad device": (lambda w: w.compress(None, "--device", "tpu"), ("tpu", "auto")),
    "unsupported device": (lambda w: w.compress(None, "--device", "meta"), ("meta", "auto")),
    "absent device": (lambda w: w.evaluate("--device", "cuda:99", "--seqlen", "32"), ("cuda:99",)),
    "bad dtype": (lambda w: w.compress(None, "--dtype", "int3"), ("int3", "float32")),
    "bad dtype, eval": (lambda w: w.evaluate("--dtype", "int3", "--seqlen", "32"), ("int3",)),
    "bad device, plan": (lambda w: ["plan", w.llama, "--recipe", w.recipe, "--device", "x"], ("'x'",)),
    "bad dtype, generate": (lambda w: ["generate", w.llama, "--prompt", "the", "--dtype", "int3"], ("int3",)),
    # Recipes.
    "unknown recipe": (lambda w: w.compress(recipe="2of4-wandaa"), ("did you mean '2of4-wanda'",)),
    "missing recipe file": (lambda w: w.compress(recipe="nowhere.yaml"), ("nowhere.yaml",)),
    "unknown key": (lambda w: w.compress(recipe=w.bad / "typo.yaml"), ("typo.yaml:5", "patern", "'pattern'")),
    "unknown pass": (lambda w: w.compress(recipe=w.bad / "pass.yaml"), ("pass.yaml:4", "did you mean 'wanda'")),
    "unknown target": (lambda w: w.compress(recipe=w.bad / "target.yaml"), ("q_prj", "did you mean 'q_proj'")),
    "bad regular expression": (lambda w: w.compress(recipe=w.bad / "regex.yaml"), ("re:(",)),
    "bad pattern": (lambda w: w.compress(recipe=w.bad / "pattern.yaml"), ("4:2",)),
    "part of a fused layer": (lambda w: w.compress(recipe=w.bad / "fused.yaml"), ("q_proj", "k_proj")),
    "recipe not YAML": (lambda w: w.compress(recipe=w.bad / "not.yaml"), ("not valid YAML",)),
    "recipe a list": (lambda w: ["recipes", w.bad / "list.yaml"], ("list.yaml", "mapping")),
    "recipe with a cycle": (lambda w: ["recipes", w.bad / "cycle.yaml"], ("cycle.yaml",)),
    # Text and windows.
    "empty text": (lambda w: w.compress(None, "--calibration", w.bad / "empty.txt"), ("empty.txt", "empty")),
    "empty text, eval": (lambda w: ["eval", w.llama, "--text", w.bad / "empty.txt"], ("empty.txt", "empty")),
    "binary text": (lambda w: w.compress(None, "--calibration", w.bad / "binary.txt"), ("binary.txt", "UTF-8")),
    "missing text": (lambda w: ["eval", w.llama, "--text", w.bad / "nowhere.txt"], ("nowhere.txt",)),
    "a folder for text": (lambda w: ["eval", w.llama, "--text", w.bad], ("broken",)),
    "too little text": (lambda w: w.compress(None, "--calibration", w.bad / "short.txt"), ("5 tokens", "32", "33")),
    "too little text, eval": (
        lambda w: ["eval", w.llama, "--text", w.bad / "short.txt", "--seqlen", "16"],
        ("5 tokens", "16"),
    ),
    "too few windows": (lambda w: w.evaluate("--seqlen", "100", "--windows", "41"), ("40 windows", "41")),
    "windows longer than the context": (lambda w: w.compress(None, "--seqlen", "129"), ("129", "128")),
    "own windows longer than the context": (
        lambda w: w.compress(None, "--calibration", "self", "--seqlen", "129"),
        ("129", "128"),
    ),
    "plan of windows longer than the context": (lambda w: ["plan", w.llama, "--recipe", "2of4-wanda"], ("1024", "128")),
    "eval windows longer than the context": (lambda w: w.evaluate("--seqlen", "129"), ("129", "128")),
    "malformed JSON lines": (
        lambda w: w.compress(None, "--calibration", w.bad / "malformed.jsonl"),
        ("malformed.jsonl:3",),
    ),
    "JSON lines without text": (
        lambda w: w.compress(None, "--calibration", w.bad / "keyless.jsonl"),
        ("keyless.jsonl:2", "text"),
    ),
    "JSON lines too deep": (lambda w: ["eval", w.llama, "--text", w.bad / "deep.jsonl"], ("deep.jsonl:1",)),
    "truncated gzip": (lambda w: w.compress(None, "--calibration", w.bad / "cut.jsonl.gz"), ("cut.jsonl.gz",)),
    "damaged gzip": (lambda w: w.compress(None, "--calibration", w.bad / "damaged.txt.gz"), ("damaged.txt.gz",)),
    "hub dataset without a network": (
        lambda w: w.compress(None, "--calibration", "organisation/dataset"),
        ("organisation/dataset",),
    ),
    "prompt without tokens": (lambda w: ["generate", w.llama, "--prompt", ""], ("--prompt",)),
    "top-p of a greedy continuation": (
        lambda w: ["generate", w.llama, "--prompt", "the", "--top-p", 0.9],
        ("--top-p", "--temperature"),
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case: str, world: World, cli: Cli) -> None:
    command, words = BAD_INPUT[case]
    full = world.bad / "full" / "mine.txt"
    result = cli(*command(world))
    message = one_line(result)
    assert result.code == 2
    assert [word for word in words if word not in message] == [], message
    assert not world.out.exists()
    assert not world.out.with_name(world.out.name + ".partial").exists()
    assert full.read_text() == "mine"


@pytest.mark.parametrize("out", [".", ""])
def test_the_current_folder_as_out_is_one_line(
    out: str, llama: Path, recipe: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("compress", llama, "--recipe", recipe, "--out", out)
    assert result.code == 2
    assert "--out" in one_line(result)


def test_a_hub_model_without_a_network_is_one_error(cli: Cli) -> None:
    result = cli("plan", "organisation/model")
    assert result.code == 2
    assert "organisation/model" in result.err
    assert sum(line.startswith("error: ") for line in result.err.splitlines()) == 1
    assert "Traceback" not in result.err


def test_a_process_fails_in_one_line_too(world: World, tmp_path: Path) -> None:
    result = process(*world.evaluate("--seqlen", "129"), cwd=tmp_path)
    assert result.code == 2
    assert "128" in one_line(result)
