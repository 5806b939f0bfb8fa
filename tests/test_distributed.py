"""Several processes share a run: the same artifact, whoever dies is named, and the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Cli, one_line
from fleet import Ended, fleet
from halfweight import InputError, Recipe, compress_checkpoint
from halfweight.compress.calibration import Windows, shared_windows
from halfweight.compress.report import CompressionReport
from halfweight.compress.world import ALONE, World
from halfweight.serving.checkpoint import Checkpoint
from runs import BLOCKS, change_tensor, contents, partial_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks processes")

# Windows of 1024 tokens are batches of their own, so that any number of processes computes the same batches.
RECIPES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"stages": [{"pass": "sparsegpt", "pattern": "2:4"}]},
    "everything": {
        "embeddings": {"bits": 8, "group_size": 32},
        "basis": {"group_size": 32},
        "stages": [
            {"pass": "gptq", "group_size": 32, "targets": ["*.mlp.*"], "low_rank": {"fraction": 0.5}},
            {
                "pass": "keep",
                "targets": ["q_proj", "k_proj", "v_proj"],
                "selection": {"sparsity": 0.4, "score": "l2", "channels": 0.6, "allocation": "greedy"},
            },
            {"pass": "keep", "targets": ["o_proj"], "selection": {"sparsity": 0.4, "threshold": "prompt"}},
        ],
    },
}


class Someone(World):
    """One of several processes that never speak."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", num_hidden_layers=BLOCKS, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def recipe_files(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("recipes"), {}
    for name, settings in RECIPES.items():
        calibration = {"data": str(text_file), "samples": 9, "seqlen": 1024}
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(Recipe.parse({"name": name, "calibration": calibration, **settings}).to_yaml())
    return files


@pytest.fixture(scope="module")
def alone(
    model: Path, recipe_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, CompressionReport]]:
    """What one process makes of a recipe, and its report."""
    made: dict[str, tuple[Path, CompressionReport]] = {}

    def make(name: str) -> tuple[Path, CompressionReport]:
        if name not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            made[name] = out, compress_checkpoint(model, Recipe.load(recipe_files[name]), out, dtype="float32")
        return made[name]

    return make


def reports(folder: Path, ended: Ended) -> list[CompressionReport]:
    assert not any(ended.codes), ended.err
    files = [folder / f"{rank}.json" for rank in range(len(ended.codes))]
    return [CompressionReport.model_validate_json(file.read_text()) for file in files]


# --- the same result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "name", "shares"),
    [(2, "everything", [5, 4]), (4, "sparsegpt", [3, 2, 2, 2])],
)
def test_any_number_of_processes_writes_the_same_bytes(
    processes: int,
    name: str,
    shares: list[int],
    model: Path,
    recipe_files: dict[str, Path],
    alone: Callable[[str], tuple[Path, CompressionReport]],
    tmp_path: Path,
) -> None:
    """Masks, values, codes, thresholds and branches: tolerance 0. So is the dev set's perplexity."""
    out, work = tmp_path / "out", tmp_path / "work"
    ended = fleet(work, processes=processes, model=model, recipe=recipe_files[name], out=out)
    first, *others = reports(work, ended)
    single, report = alone(name)
    assert contents(out) == contents(single)
    assert [f.name for f in tmp_path.iterdir() if f != work] == ["out"]
    assert first.windows_by_process == shares
    assert first.processes == processes
    assert (report.windows_by_process, report.processes) == ([9], 1)
    assert first.dev == report.dev
    for a, b in zip(first.layers, report.layers, strict=True):
        assert a.name == b.name
        assert a.error == pytest.approx(b.error, rel=1e-4)
    for other in others:
        assert other == first


def test_short_windows_are_divided_one_by_one(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """They are batched differently then, and rounded differently: masks 99 % alike, perplexity to 1 %."""
    dense, file = make_model("llama"), tmp_path / "wanda.yaml"
    settings = {"data": str(text_file), "samples": 8, "seqlen": 32}
    recipe = Recipe.parse({"name": "w", "calibration": settings, "stages": [{"pass": "wanda", "pattern": "2:4"}]})
    file.write_text(recipe.to_yaml())
    ended = fleet(tmp_path / "work", processes=2, model=dense, recipe=file, out=tmp_path / "two")
    two = reports(tmp_path / "work", ended)[0]
    one = compress_checkpoint(dense, recipe, tmp_path / "one", dtype="float32")
    assert two.windows_by_process == [4, 4]
    assert two.dev.compressed == pytest.approx(one.dev.compressed, rel=0.01)
    a, b = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    masks = [name for name in a.tensors if name.endswith(".meta")]
    same = torch.cat([(a.read(name) == b.read(name)).flatten() for name in masks])
    assert float(same.float().mean()) >= 0.99


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "victim", "message"),
    [("kill", 1, "died"), ("kill", 0, "died"), ("stop", 1, "has not been heard of for 4 s")],
)
def test_the_dead_are_named_and_the_run_resumes(
    how: str,
    victim: int,
    message: str,
    model: Path,
    recipe_files: dict[str, Path],
    alone: Callable[[str], tuple[Path, CompressionReport]],
    tmp_path: Path,
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    run: dict[str, Any] = {"model": model, "recipe": recipe_files["sparsegpt"], "out": out}
    ended = fleet(work, processes=3, **run, **{how: {victim: 2}})
    pid = int((work / f"{victim}.pid").read_text())
    survivors = [code for rank, code in enumerate(ended.codes) if rank != victim]
    assert survivors == [1, 1]
    assert ended.codes[victim] == -9
    (line,) = ended.errors
    assert line.startswith(f"error: rank {victim} (")
    assert line.endswith(f":{pid}) {message} while block 2 was being solved; start the same command again to resume")
    assert [f.name for f in tmp_path.iterdir() if f != work] == ["out.partial"]
    assert not list(partial_of(out).glob("*.tmp"))
    # Another number of processes goes on, to the same bytes.
    if (how, victim) == ("kill", 1):
        done = reports(work, fleet(work, processes=2, **run))[0]
    else:
        done = compress_checkpoint(model, Recipe.load(run["recipe"]), out, dtype="float32")
    assert done.blocks_resumed == 2
    assert contents(out) == contents(alone("sparsegpt")[0])


def test_what_fails_in_another_process_is_one_line_with_its_rank(
    make_model: Callable[..., Path], recipe_files: dict[str, Path], tmp_path: Path
) -> None:
    dense = make_model("llama", max_position_embeddings=1024)
    # The second linear of a pause is rank 1's.
    change_tensor(dense, "model.layers.1.self_attn.k_proj.weight", lambda t: t[0].fill_(float("nan")))
    run = {"model": dense, "recipe": recipe_files["sparsegpt"], "out": tmp_path / "out"}
    ended = fleet(tmp_path / "work", processes=2, **run)
    assert ended.codes == [1, 1]
    (line,) = ended.errors
    assert line.startswith("error: rank 1 (")
    assert line.endswith("model.layers.1.self_attn.k_proj: its weights are not finite; check the checkpoint for damage")
    assert "Traceback" not in ended.err


def test_what_all_processes_refuse_is_said_once(tmp_path: Path) -> None:
    run = {"model": tmp_path / "missing", "recipe": "2of4-wanda", "out": tmp_path / "out"}
    ended = fleet(tmp_path / "work", processes=2, **run)
    assert ended.codes == [2, 2]
    assert ended.errors == [f"error: no such folder or file: {tmp_path / 'missing'}"]
    assert "Traceback" not in ended.err


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_does_not_spread_is_refused_before_any_work(
    model: Path, text_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"tuning does not spread over 2 processes; add --tuning none"):
        compress_checkpoint(model, "w4-g64-best", tmp_path / "out", world=Someone(0, 2))
    windows = Windows([torch.zeros(8, dtype=torch.long)] * 3, [torch.zeros(8, dtype=torch.long)], 100)
    with pytest.raises(InputError, match=r"3 calibration windows for 4 processes; use --samples 4"):
        shared_windows(Someone(0, 4), lambda: windows)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "demo runs in one process; start it without torchrun" in one_line(cli("demo"))
    assert list(tmp_path.iterdir()) == []


# --- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("samples", "length"), [(9, 1024), (40, 128), (8, 32), (7, 512)])
def test_shares_are_even_disjoint_and_in_order(size: int, samples: int, length: int) -> None:
    drawn = list(torch.arange(samples * length).view(samples, length))
    windows = Windows(drawn, drawn[:2], 0, drawn[2:])
    shares = [windows.share(Someone(rank, size)) for rank in range(size)]
    for part in ("calibration", "dev", "tuning"):
        joined = [window for share in shares for window in getattr(share, part)]
        assert all(map(torch.equal, joined, getattr(windows, part)))
        assert len(joined) == len(getattr(windows, part))
    counts = [len(share.calibration) for share in shares]
    batch = max(1, 1024 // length)
    assert min(counts) >= 1
    assert max(counts) - min(counts) < 2 * batch  # the last batch may be smaller
    if -(-samples // batch) >= size:
        assert all(count % batch == 0 for count in counts[:-1])


def test_one_process_is_a_world_of_its_own() -> None:
    total = torch.arange(4.0)
    assert ALONE.leads
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.rounds(["q", "k"]) == [["q"], ["k"]]
    assert ALONE.sum(total) is total
    assert ALONE.gathered({"a": 1}) == [{"a": 1}]
    assert Someone(1, 2).rounds(["q", "k", "v"]) == [["q", "k"], ["v"]]
