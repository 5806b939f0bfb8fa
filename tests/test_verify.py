"""`verify`: what an artifact is checked for, and what it says of an artifact that is not as it was written."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfweight
from commands import Cli, ok, one_line, read
from halfweight import Recipe, compress_checkpoint, verify_checkpoint
from halfweight.compress import provenance
from halfweight.compress.report import Progress
from halfweight.serving.durable import sha256_of
from halfweight.serving.integrity import SUMS, write_sums
from runs import BLOCKS, Stop, change_tensor, contents, parsed

SHARD = "halfweight-00001-of-00001.safetensors"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="module")
def quantized(dense: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with int4 groups, a branch of integers, an int8 embedding and a pattern that is stored whole."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    settings = {"data": str(text_file), "samples": 4, "seqlen": 32}
    branch = {"fraction": 0.5, "bits": 8, "group_size": 16}
    stages = [
        {
            "pass": "gqsa",
            "pattern": "1x16",
            "density": 0.5,
            "group_size": 16,
            "targets": ["q_proj", "k_proj", "v_proj"],
        },
        {"pass": "rtn", "group_size": 16, "low_rank": branch, "targets": ["o_proj"]},
        {"pass": "magnitude", "pattern": "4:8", "targets": ["*.mlp.*"]},
    ]
    recipe = {"calibration": settings, "stages": stages, "embeddings": {"bits": 8, "group_size": 16}}
    compress_checkpoint(dense, Recipe.parse({"name": "mixed", **recipe}), out)
    return out


def problems(folder: Path, *arguments: Any, **options: Any) -> list[str]:
    found = verify_checkpoint(folder, *arguments, **options).problems
    assert all("\n" not in line for line in found)
    return found


# --- integrity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "quantized"])
def test_what_was_written_has_no_problem(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    report = verify_checkpoint(folder)
    assert report.problems == report.notes == []
    assert report.files == len(list(folder.iterdir())) - 1
    assert report.weights >= 7 * BLOCKS
    assert (report.inputs, report.reproduced) == (0, None)


def test_the_sums_are_those_of_coreutils(whole: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(list(whole.iterdir())) - 1


def test_a_flipped_bit_anywhere_names_its_file(whole: Path, copy: Path) -> None:
    generator = random.Random(0)
    for file in sorted(copy.iterdir()):
        data = file.read_bytes()
        for place in (0, len(data) - 1, *(generator.randrange(len(data)) for _ in range(4))):
            flipped = bytearray(data)
            flipped[place] ^= 1 << generator.randrange(8)
            file.write_bytes(flipped)
            assert any(file.name in line for line in problems(copy)), (file.name, place)
        file.write_bytes(data)
    assert problems(copy) == []


def test_an_edited_recipe_a_missing_file_and_a_new_shard_are_named(copy: Path) -> None:
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("wanda", "magnitude"), encoding="utf-8")
    (copy / "tokenizer.json").unlink()
    shutil.copyfile(copy / SHARD, copy / "more.safetensors")
    (copy / "verdicts.json").write_text("{}")
    report = verify_checkpoint(copy)
    assert [line.split(":")[0] for line in report.problems] == ["recipe.yaml", "tokenizer.json", "more.safetensors"]
    assert report.notes == ["not part of the artifact, not checked: verdicts.json"]


def test_sums_that_reach_outside_are_not_followed(copy: Path) -> None:
    (copy.parent / "secret").write_text("secret")
    with (copy / SUMS).open("a") as stream:
        stream.write(f"{sha256_of(copy.parent / 'secret')}  ../secret\n")
    (line,) = problems(copy)
    assert line.startswith(f"{SUMS}: line ")


def swapped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        tensors[name] = change(tensors[name].clone())
        save_file(tensors, folder / SHARD, {"format": "pt"})

    return edit


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill_(0, torch.tensor([0]), value)


def infinite(scales: Tensor) -> Tensor:
    scales.view(-1)[0] = 0x7C00
    return scales


B0 = "model.layers.0"
# Fixture, what is changed, and words of the one line that must come of it.
STRUCTURE: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "2:4 positions": ("whole", f"{B0}.self_attn.q_proj.meta", lambda t: t.fill_(1), "out of order"),
    "2:4 values": ("whole", f"{B0}.mlp.up_proj.values", filled(float("nan")), "not finite"),
    "a norm": ("whole", "model.norm.weight", filled(float("inf")), "not all of its numbers are finite"),
    "scales": ("quantized", f"{B0}.self_attn.k_proj.scales", infinite, "finite"),
    "a branch's scales": ("quantized", f"{B0}.self_attn.o_proj.V.scales", infinite, "finite"),
    "the embedding's scales": ("quantized", "model.embed_tokens.scales", infinite, "finite"),
    "a pattern stored whole": ("quantized", f"{B0}.mlp.up_proj.weight", filled(1.0), "pattern 4:8"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_tensors_that_are_not_valid_are_named_whatever_their_hash(
    case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind, name, change, words = STRUCTURE[case]
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy"))
    swapped(name, change)(folder)
    write_sums(folder)
    (line,) = problems(folder)
    assert line.startswith(f"{SHARD}: {name.rpartition('.')[0]}")
    assert words in line


def test_a_folder_without_sums_is_still_looked_at(copy: Path) -> None:
    (copy / SUMS).unlink()
    (line,) = problems(copy)
    assert line.startswith(f"{SUMS}: missing")
    (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-9])
    assert [SHARD in line for line in problems(copy)] == [False, True]


def test_what_is_no_artifact_is_bad_input(dense: Path, tmp_path: Path, cli: Cli) -> None:
    for folder in (dense, tmp_path, tmp_path / "nowhere"):
        result = cli("verify", folder)
        assert result.code == 2
        assert str(folder) in one_line(result)


# --- inputs --------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_run_was_made_from(dense: Path, whole: Path, text_file: Path) -> None:
    report = read(whole / "report.json")
    found = report["provenance"]
    assert found["model"] == {f.name: sha256_of(f) for f in dense.iterdir()}
    assert found["text"] == sha256_of(text_file)
    assert re.fullmatch("[0-9a-f]{64}", found["code"])
    assert found["threads"] == torch.get_num_threads()
    assert report["versions"]["halfweight"] == halfweight.__version__


def test_the_hash_of_the_code_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compress").mkdir()
    file = tmp_path / "compress" / "solver.py"
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    hashes = set()
    for text in ("a = 1\n", "a = 2\n"):
        file.write_text(text)
        hashes.add(provenance.code_hash())
    file.rename(file.with_name("other.py"))
    hashes.add(provenance.code_hash())
    assert len(hashes) == 3


def test_the_inputs_at_hand_are_compared(dense: Path, whole: Path, text_file: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(whole, dense)
    assert report.problems == report.notes == []
    assert report.inputs == len(list(dense.iterdir())) + 1

    other = Path(shutil.copytree(dense, tmp_path / "other"))
    change_tensor(other, "model.norm.weight", lambda t: t.mul_(1.5))
    (other / "tokenizer_config.json").unlink()
    (other / "LICENSE").write_text("new\n")
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8") + " the", encoding="utf-8")
    lines = problems(whole, other, text)
    names = [str(other / n) for n in ("LICENSE", "model.safetensors", "tokenizer_config.json")] + [str(text)]
    assert [line.split(": ")[0] for line in lines] == names


def test_a_text_that_has_gone_is_a_note(dense: Path, text_file: Path, tmp_path: Path) -> None:
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    compress_checkpoint(dense, parsed(text, {"pass": "wanda"}), tmp_path / "out")
    text.unlink()
    report = verify_checkpoint(tmp_path / "out", dense)
    assert report.problems == []
    assert [str(text) in note and "--calibration" in note for note in report.notes] == [True]
    report = verify_checkpoint(tmp_path / "out", dense, text_file, reproduce=True)
    assert report.problems == report.notes == []
    assert report.reproduced is True


# --- reproduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "quantized"])
def test_compressing_again_gives_the_same_bytes(kind: str, dense: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    before = contents(folder)
    report = verify_checkpoint(folder, dense, reproduce=True)
    assert report.problems == report.notes == []
    assert report.reproduced is True
    assert contents(folder) == before
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_reproduction_goes_on(dense: Path, copy: Path) -> None:
    def stop(step: Progress) -> None:
        if step.stage == "blocks" and step.done == 2 and "error" in step.detail:
            raise Stop

    seen: list[Progress] = []
    with pytest.raises(Stop):
        verify_checkpoint(copy, dense, reproduce=True, progress=stop)
    assert verify_checkpoint(copy, dense, reproduce=True, progress=seen.append).reproduced is True
    solved = {step.done for step in seen if step.stage == "blocks" and "error" in step.detail}
    assert solved == {2, 3}


def test_tensors_that_the_recipe_does_not_give_are_named(dense: Path, copy: Path, cli: Cli, tmp_path: Path) -> None:
    # Forged as a whole: valid, and with hashes that fit.
    swapped(f"{B0}.self_attn.q_proj.values", lambda t: t * 2)(copy)
    report = json.loads((copy / "report.json").read_text(encoding="utf-8"))
    report["provenance"]["threads"] += 1
    (copy / "report.json").write_text(json.dumps(report), encoding="utf-8")
    write_sums(copy)
    assert problems(copy, dense) == []
    file = tmp_path / "verify.json"
    result = cli("verify", copy, "--model", dense, "--reproduce", "--json", file)
    assert result.code == 1
    assert f"{SHARD}: compressing again gives other bytes" in result.out
    assert "threads" in result.out
    assert "1 problem found" in result.err.splitlines()[-1]
    assert read(file)["reproduced"] is False


def test_other_inputs_are_not_compressed(whole: Path, llama: Path) -> None:
    report = verify_checkpoint(whole, llama, reproduce=True)
    assert report.reproduced is None
    assert any("model.safetensors" in line for line in report.problems)
    assert any("not compressed again" in note for note in report.notes)


def test_the_command(whole: Path, copy: Path, cli: Cli) -> None:
    assert "are as written" in ok(cli("verify", whole)).out
    (copy / "recipe.yaml").write_text("name: other\n")
    result = cli("verify", copy)
    assert result.code == 1
    assert "recipe.yaml: was changed" in result.out
    assert cli("verify", whole, "--reproduce").code == 2
