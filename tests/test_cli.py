"""The command line's contract: help, JSON, exit codes, and one line on stderr for every bad input."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfweight
import halfweight.cli
from halfweight.compress import writer
from halfweight.compress.recipe import named_recipes
from halfweight.eval.text import read_text

VERBS = ["demo", "plan", "compress", "eval", "inspect", "generate", "recipes"]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `halfweight ARGUMENTS` in this process, through the real entry point."""
    from transformers.utils import logging

    # In a process of its own the command does this through the environment, before transformers is imported.
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def run(*arguments: Any) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["halfweight", *map(str, arguments)])
        code: Any = 0
        try:
            halfweight.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: Wanda 2:4 with four windows of 32 tokens of the test text."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(
        "description: for tests\n"
        f"calibration: {{data: {text_file}, samples: 4, seqlen: 32}}\n"
        "stages:\n- pass: wanda\n  pattern: '2:4'\n",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def compressed(llama: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    halfweight.compress_checkpoint(llama, recipe, out)
    return out


def ok(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def read(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("halfweight-*.safetensors")))


# --- help and JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, cli: Cli) -> None:
    result = ok(cli(verb, "--help"))
    assert "Example" in result.out
    assert f"halfweight {verb}" in result.out
    assert result.err == ""


def test_help_lists_every_verb_and_version_is_one_line(cli: Cli) -> None:
    text = ok(cli("--help")).out
    assert all(verb in text for verb in VERBS)
    assert ok(cli("--version")).out == f"halfweight {halfweight.__version__}\n"


def test_compress_writes_its_report(llama: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    command = ["compress", llama, "--recipe", recipe, "--out", tmp_path / "out", "--json", tmp_path / "c.json"]
    result = ok(cli(*command))
    report = read(tmp_path / "c.json")
    assert report == read(tmp_path / "out" / "report.json")
    assert report["seconds"] > 0
    assert report["peak_rss_gb"] > 0
    assert report["blocks_resumed"] == 0
    assert report["calibration_tokens"] == 4 * 32
    assert "effective bits" in result.out
    assert "9.000" in result.out
    ok(cli(*command, "--overwrite"))
    halfweight.load(tmp_path / "out")


def test_flags_override_the_recipe(
    llama: Path, recipe: Path, cli: Cli, compressed: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    shutil.copy(text_file, text)
    flags = ["--calibration", text, "--samples", 3, "--seqlen", 16, "--seed", 5]
    ok(cli("compress", llama, "--recipe", recipe, "--out", tmp_path / "out", *flags, "--json", tmp_path / "c.json"))
    ran = halfweight.Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert ran.calibration.model_dump() == {"data": str(text), "samples": 3, "seqlen": 16, "seed": 5}
    assert ran.stages == halfweight.Recipe.load(recipe).stages
    report = read(tmp_path / "c.json")
    assert (report["calibration_tokens"], report["seed"], report["calibration_data"]) == (48, 5, str(text))
    assert weights(tmp_path / "out") != weights(compressed)


def test_an_interrupt_is_one_line_and_the_same_command_resumes(
    llama: Path, recipe: Path, compressed: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", llama, "--recipe", recipe, "--out", tmp_path / "out", "--json", tmp_path / "c.json"]
    write = writer.write_part

    def interrupted(file: Path, *arguments: Any) -> None:
        if file.name == "block-00001.safetensors":
            raise KeyboardInterrupt
        write(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_part", interrupted)
        result = cli(*command)
    assert result.code == 130
    assert "resumes" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()
    ok(cli(*command))
    assert read(tmp_path / "c.json")["blocks_resumed"] == 1
    assert weights(tmp_path / "out") == weights(compressed)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("windows, seqlen", [(None, 40), (3, 40), (2, 300)])
def test_eval_equals_a_plain_computation(
    bos: bool,
    windows: int | None,
    seqlen: int,
    make_model: Callable[..., Path],
    text_file: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    folder = make_model("llama", bos=bos, max_position_embeddings=512)
    limit = [] if windows is None else ["--windows", windows]
    ok(cli("eval", folder, "--text", text_file, "--seqlen", seqlen, *limit, "--json", tmp_path / "e.json"))
    result = read(tmp_path / "e.json")

    text = text_file.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]  # with BOS, where the tokenizer adds it
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = len(ids) // seqlen if windows is None else windows
    losses = []
    for number in range(count):
        window = torch.tensor(ids[number * seqlen : (number + 1) * seqlen])
        if bos:
            window[0] = 1
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:]))
    assert result["perplexity"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert result["tokens"] == count * (seqlen - 1)
    assert (result["windows"], result["seqlen"], result["bos"]) == (count, seqlen, bos)
    assert result["model"] == str(folder)
    assert result["dtype"] == "float32"


def test_eval_of_a_compressed_model_uses_its_weights(
    compressed: Path, text_file: Path, cli: Cli, tmp_path: Path
) -> None:
    flags = ["--text", text_file, "--seqlen", 64, "--windows", 4, "--json", tmp_path / "e.json"]
    ok(cli("eval", compressed, *flags))
    result = read(tmp_path / "e.json")
    halfweight.load(compressed, dtype="float32").save_pretrained(tmp_path / "again")
    for file in compressed.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "again")
    ok(cli("eval", tmp_path / "again", *flags))
    assert read(tmp_path / "e.json")["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)


def test_inspect_and_plan_agree(llama: Path, recipe: Path, compressed: Path, cli: Cli, tmp_path: Path) -> None:
    ok(cli("inspect", compressed, "--json", tmp_path / "i.json"))
    ok(cli("plan", llama, "--recipe", recipe, "--json", tmp_path / "p.json"))
    inspected, planned = read(tmp_path / "i.json"), read(tmp_path / "p.json")
    for key in ("effective_bits", "effective_bits_model"):
        assert planned[key] == pytest.approx(inspected[key])
    assert inspected["effective_bits"] == 9
    assert [layer["name"] for layer in planned["layers"]] == [layer["name"] for layer in inspected["layers"]]
    assert len(inspected["layers"]) == 14
    layer = {"pattern": "2:4", "numbers": "bfloat16", "density": 0.5, "bits": 9.0}
    assert all(layer.items() <= found.items() and found["error"] > 0 for found in inspected["layers"])
    assert planned["peak_memory_gb"] > 0
    assert planned["seconds"] > 0
    assert planned["blocks"] == 2


def test_inspect_shows_a_dense_model_too(llama: Path, cli: Cli, tmp_path: Path) -> None:
    ok(cli("inspect", llama, "--json", tmp_path / "i.json"))
    result = read(tmp_path / "i.json")
    assert (result["format_version"], result["effective_bits"], result["effective_bits_model"]) == (None, 16, 16)
    assert {layer["pattern"] for layer in result["layers"]} == {"dense"}


def test_generate_is_greedy(compressed: Path, cli: Cli, tmp_path: Path) -> None:
    prompt = "the of and to"
    result = ok(cli("generate", compressed, "--prompt", prompt, "--max-new-tokens", 6, "--json", tmp_path / "g.json"))
    data = read(tmp_path / "g.json")
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert data["prompt"] == prompt
    assert data["tokens"] == len(new)
    assert data["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert data["seconds"] > 0
    assert prompt in result.out


def test_recipes_lists_what_ships_and_checks_files(recipe: Path, cli: Cli, tmp_path: Path) -> None:
    ok(cli("recipes", "--json", tmp_path / "r.json"))
    rows = read(tmp_path / "r.json")["recipes"]
    assert [row["name"] for row in rows] == list(named_recipes())
    assert all(row["description"] and row["stages"] for row in rows)
    ok(cli("recipes", recipe, "--json", tmp_path / "r.json"))
    assert read(tmp_path / "r.json")["recipes"] == [
        {"name": "small", "description": "for tests", "stages": ["wanda 2:4"]}
    ]


def test_a_json_file_that_cannot_be_written_is_one_line(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "r.json"
    result = cli("recipes", "--json", file)
    assert result.code == 2
    assert one_line(result).startswith(f"error: --json {file}: cannot be written")


def test_line_endings_do_not_change_the_text(tmp_path: Path) -> None:
    unix, windows = tmp_path / "unix.txt", tmp_path / "windows.txt"
    unix.write_bytes(b"one\ntwo\n\nthree")
    windows.write_bytes(b"one\r\ntwo\r\n\r\nthree")
    assert read_text(windows) == read_text(unix) == "one\ntwo\n\nthree"


# --- calibration text ----------------------------------------------------------------------------------------------


def test_text_files_of_every_kind_calibrate_alike(
    llama: Path, recipe: Path, text_file: Path, cli: Cli, tmp_path: Path
) -> None:
    words = text_file.read_text(encoding="utf-8").split()
    documents = [" ".join(words[i : i + 100]) for i in range(0, 1000, 100)]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(documents))
    (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(text) + "\n" for text in documents), encoding="utf-8")
    results = set()
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.jsonl"):
        out = tmp_path / f"out-{name}"
        ok(cli("compress", llama, "--recipe", recipe, "--out", out, "--calibration", tmp_path / name))
        results.add(weights(out))
    assert len(results) == 1


def test_builtin_text_calibrates(llama: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok(cli("compress", llama, "--recipe", recipe, "--out", out, "--calibration", "builtin", "--json", tmp_path / "c"))
    assert read(tmp_path / "c")["calibration_data"] == "builtin"


def test_the_models_own_text_depends_on_the_seed_alone(llama: Path, recipe: Path, cli: Cli, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)  # the caller's generator must not matter, nor be changed
        state = torch.get_rng_state()
        out = tmp_path / str(number)
        ok(cli("compress", llama, "--recipe", recipe, "--out", out, "--calibration", "self", "--seed", seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(out))
    assert found[0] == found[1]
    assert found[0] != found[2]


# --- bad input -----------------------------------------------------------------------------------------------------


def one_line(result: Result) -> str:
    """The single line on stderr of a command that failed as it should."""
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: ")
    assert result.out == ""
    return result.err


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
    "config with a wrong type": (lambda w: w.compress(w.bad / "config-type"), ("config-type", "hidden_size")),
    "config with a wrong type, eval": (lambda w: ["eval", w.bad / "config-type"], ("config-type",)),
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


# --- the real process ----------------------------------------------------------------------------------------------


def process(*arguments: Any, cwd: Path) -> Result:
    """`python -m halfweight ARGUMENTS` in a process of its own."""
    path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")}
    command = [sys.executable, "-m", "halfweight", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=env, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_process_fails_in_one_line_too(world: World, tmp_path: Path) -> None:
    result = process(*world.evaluate("--seqlen", "129"), cwd=tmp_path)
    assert result.code == 2
    assert "128" in one_line(result)


def test_a_process_generates_without_noise(compressed: Path, tmp_path: Path) -> None:
    result = ok(process("generate", compressed, "--prompt", "the of", "--max-new-tokens", 3, cwd=tmp_path))
    assert result.out.startswith("the of")
    assert "per second" in result.err
    assert result.err.count("\n") == 1
