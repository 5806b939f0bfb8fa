"""The command line's contract: help, JSON, exit codes, and what each verb answers."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfweight
import halfweight.cli
from commands import Cli, ok, one_line, process, read, weights
from halfweight.compress import writer
from halfweight.compress.recipe import named_recipes
from halfweight.eval.text import read_text

VERBS = ["demo", "plan", "compress", "eval", "compare", "sweep", "inspect", "verify", "generate", "recipes"]


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
    flags = ["--calibration", text, "--samples", 3, "--seqlen", 16, "--seed", 5, "--embeddings", 4]
    ok(cli("compress", llama, "--recipe", recipe, "--out", tmp_path / "out", *flags, "--json", tmp_path / "c.json"))
    ran = halfweight.Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert ran.calibration.model_dump() == {"data": str(text), "samples": 3, "seqlen": 16, "seed": 5}
    assert ran.stages == halfweight.Recipe.load(recipe).stages
    assert ran.embeddings is not None
    assert ran.embeddings.bits == 4
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
    assert "go on with the same command" in result.err.splitlines()[-1]
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
    ok(cli("plan", llama, "--recipe", recipe, "--samples", 5, "--seqlen", 32, "--json", tmp_path / "flags.json"))
    assert read(tmp_path / "flags.json")["stages"][0]["tokens"] == 5 * 32


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


def test_generate_samples_by_its_seed(compressed: Path, cli: Cli, tmp_path: Path) -> None:
    def text(*flags: str | float) -> str:
        settings = ("--prompt", "the of and to", "--max-new-tokens", 12, "--json", tmp_path / "g.json")
        ok(cli("generate", compressed, *settings, *flags))
        return str(read(tmp_path / "g.json")["text"])

    greedy, hot = text(), ("--temperature", 5.0)
    assert text(*hot) == text(*hot, "--seed", 0) != text(*hot, "--seed", 1)
    assert text(*hot, "--top-p", 0) == text("--temperature", 1e-4) == greedy


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


# --- the real process ----------------------------------------------------------------------------------------------


def test_a_process_generates_without_noise(compressed: Path, tmp_path: Path) -> None:
    result = ok(process("generate", compressed, "--prompt", "the of", "--max-new-tokens", 3, cwd=tmp_path))
    assert result.out.startswith("the of")
    assert "per second" in result.err
    assert result.err.count("\n") == 1
