"""Searches in runs: the fitness, whole runs, resume, profiles, and bad input."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfweight
from commands import Cli, load_script
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress.blocks import BlockWalker, open_dense
from halfweight.compress.passes.base import SelectionSettings
from halfweight.compress.plan import plan
from halfweight.compress.recipe import named_recipes
from halfweight.compress.report import CompressionReport, OnProgress, Progress
from halfweight.compress.search.config import Search
from halfweight.compress.search.fitness import open_fitness
from halfweight.compress.search.space import Space
from halfweight.compress.target import with_removed
from halfweight.eval.metrics import kl_divergence
from halfweight.eval.report import write_page
from recipe_cases import SHAPES, failure, refusal
from runs import Stop, contents, fails, interrupt, partial_of
from searches import recipe, space

# --- fitness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [{}, {"score": "l2", "channels": 0.8, "branch": "weight"}], ids=["size", "l2"])
@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_the_fitness_is_what_the_definition_gives(
    objective: str, selection: dict[str, Any], llama: Path, text_file: Path
) -> None:
    """Against the dense model with hooks that zero what is not read, and full logits."""
    settings = recipe(text_file, {"objective": objective}, **selection)
    walker = BlockWalker(open_dense(llama), torch.device("cpu"), torch.float32)
    stages = settings.resolve(walker.linear_shapes())
    assert settings.search is not None
    blocks = [{n: walker.linear_shapes()[n] for n in walker.block_linears(i)} for i in range(walker.n_blocks)]
    where = Space(settings.search, stages, blocks)
    windows = [torch.arange(n, n + 64) * 7 % 50 + 3 for n in (0, 11)]
    point = torch.rand(where.size, generator=torch.Generator().manual_seed(5)).tolist()
    budgets = where.budgets(point, {})
    with open_fitness(walker, where, stages, windows[:1], windows, lambda text: None) as fitness:
        got, again = fitness(budgets), fitness(budgets)
    assert got == again
    assert not any("forward" in vars(module) for module in walker.model.modules())  # all as it was

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.stack(windows)
    with torch.no_grad():
        dense = model(ids).logits[:, :-1]

        def hook(name: str) -> Any:
            share, rank = where.members[name].split(budgets[name])

            def select(module: torch.nn.Linear, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
                x, weight = args[0], module.weight
                norms = weight.norm(dim=0) if selection else torch.ones(weight.shape[1])
                score = x.abs() * norms
                read = score > score[:, 1:].flatten().quantile(1 - share)
                read[:, :1] = True  # the first 1 % of 64 tokens
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                low = (u[:, :rank] * s[:rank]) @ vh[:rank]
                return (x * read) @ weight.T + (x * ~read) @ low.T

            return select

        for name in budgets:
            model.get_submodule(name).register_forward_hook(hook(name))
        logits = model(ids).logits[:, :-1]
    kl = float(kl_divergence(dense, logits).mean())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert got == pytest.approx(
        kl if objective == "kl" else float(loss.exp()), rel=0.1
    )  # thresholds come from a sketch
    assert kl > 0.01


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deaf(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama of three blocks whose middle one adds almost nothing to the stream."""
    folder = make_model("llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].mul_(1e-3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


FOUND = {"trials": 24, "population": 6}


@pytest.fixture(scope="module")
def searched(deaf: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressionReport]:
    out = tmp_path_factory.mktemp("searched") / "out"
    return out, compress_checkpoint(deaf, recipe(text_file, FOUND, channels=0.9), out)


def test_a_search_finds_the_block_that_does_not_matter(searched: tuple[Path, CompressionReport]) -> None:
    report = searched[1]
    assert report.searched is not None and report.searched.groups == [[0], [1], [2]]
    assert len(report.search) == 24
    best = report.search[report.searched.chosen]
    assert best.objective == min(trial.objective for trial in report.search) < 0.9 * report.search[0].objective
    assert best.sparsity[1] > max(best.sparsity[0], best.sparsity[2]) + 0.1
    assert report.search[0].sparsity == pytest.approx([0.5] * 3)
    for trial in report.search:
        assert sum(trial.sparsity) == pytest.approx(1.5, rel=1e-10)  # the blocks have one size
    stats = {layer.name: layer.stats for layer in report.layers}
    for block in range(3):
        up = stats[f"model.layers.{block}.mlp.up_proj"]
        assert up["sparsity"] == pytest.approx(best.sparsity[block])
        assert up["channels"] == pytest.approx(best.channels[block])


def test_the_artifacts_recipe_makes_it_again_without_a_search(
    searched: tuple[Path, CompressionReport], deaf: Path, tmp_path: Path
) -> None:
    folder, _ = searched
    found = Recipe.load(folder / "recipe.yaml")
    selection = found.stages[0].selection
    assert (
        found.search is None
        and selection is not None
        and list(selection.profile) == [f"model.layers.{block}" for block in range(3)]
    )
    compress_checkpoint(deaf, found, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def stop_in_trial(number: int) -> OnProgress:
    def progress(step: Progress) -> None:
        if step.stage == "search" and step.done == number and "->" in step.detail:
            raise Stop

    return progress


@pytest.mark.parametrize("stop", [3, 24])
def test_an_interrupted_search_makes_the_same_trials(
    stop: int, searched: tuple[Path, CompressionReport], deaf: Path, text_file: Path, tmp_path: Path
) -> None:
    folder, report = searched
    same = recipe(text_file, FOUND, channels=0.9)
    work = interrupt(deaf, same, tmp_path / "out", stop_in_trial(stop))
    lines = (work / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"trial"' in line for line in lines) == stop
    with (work / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write('{"note": "tri')  # as a crash leaves it
    other = recipe(text_file, {**FOUND, "seed": 1}, channels=0.9)
    assert "holds an unfinished run of another model, data, recipe" in fails(InputError, deaf, other, tmp_path / "out")
    resumed = compress_checkpoint(deaf, same, tmp_path / "out")
    assert [t.model_dump(exclude={"seconds"}) for t in resumed.search] == [
        t.model_dump(exclude={"seconds"}) for t in report.search
    ]
    assert [t.seconds for t in resumed.search[:stop]] != [t.seconds for t in report.search[:stop]]
    assert contents(tmp_path / "out") == contents(folder)


def test_trials_of_another_version_are_refused(deaf: Path, text_file: Path, tmp_path: Path) -> None:
    same = recipe(text_file)
    work = interrupt(deaf, same, tmp_path / "out", stop_in_trial(3))
    lines = (work / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(lines[2])
    entry["is"]["point"][0] += 0.25
    lines[2] = json.dumps(entry)
    (work / "journal.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "another version of the search made trial 1; pass --fresh" in fails(RunError, deaf, same, tmp_path / "out")


@pytest.mark.parametrize(
    "stage",
    [
        {"pass": "keep", "selection": {"sparsity": 0.5, "allocation": "greedy", "score": "l2"}},
        {"pass": "rtn", "group_size": 16, "along": "outputs", "selection": {"sparsity": 0.4, "channels": 0.8}},
    ],
    ids=["greedy", "int4 and branch"],
)
def test_searches_go_with_greedy_blocks_and_integers(
    stage: dict[str, Any], deaf: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = {"data": str(text_file), "samples": 4, "seqlen": 32}
    search = {"trials": 3, "population": 2, "samples": 1, "seqlen": 32, "method": "random"}
    settings = Recipe.parse({"calibration": calibration, "stages": [stage], "search": search})
    report = compress_checkpoint(deaf, settings, tmp_path / "out", dtype="float32")
    found = Recipe.load(tmp_path / "out" / "recipe.yaml").stages[0].selection
    assert found is not None and found.allocation == "uniform"
    # Greedy blocks have an entry per linear, others one per block.
    assert len(found.profile) == (21 if stage["pass"] == "keep" else 3)
    spent = {trial: sum(report.search[trial].sparsity) for trial in range(3)}
    assert spent == pytest.approx(dict.fromkeys(range(3), 3 * stage["selection"]["sparsity"]), rel=1e-9)
    if stage["pass"] != "keep":
        return  # its scales do not grow with the weights
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    unread = sum(sizes[layer.name] * layer.stats["sparsity"] for layer in report.layers)
    assert unread / sum(sizes.values()) == pytest.approx(stage["selection"]["sparsity"], rel=1e-9)


def test_the_page_shows_the_search(searched: tuple[Path, CompressionReport], tmp_path: Path) -> None:
    html, markdown = (file.read_text(encoding="utf-8") for file in write_page(searched[0], tmp_path / "page.html"))
    assert "24 trials of 3 x 64 tokens" in html and "24 trials of 3 x 64 tokens" in markdown.replace("\\", "")
    assert (
        "before and after the search" in html and "share of bytes not read" in html and "best so far, step 23" in html
    )
    assert "the share that goes to inputs" in html


def test_flags_and_plan(llama: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe(text_file).with_search("none").to_yaml(), encoding="utf-8")
    flags = ("--search", "random", "--search-trials", 2)
    result = cli("compress", llama, "--recipe", file, "--out", tmp_path / "out", "--json", tmp_path / "r.json", *flags)
    assert result.code == 2 and "search.seqlen: windows of 512 tokens exceed the model's context of 128" in result.err
    file.write_text(recipe(text_file).to_yaml(), encoding="utf-8")
    result = cli("compress", llama, "--recipe", file, "--out", tmp_path / "out", "--json", tmp_path / "r.json", *flags)
    assert result.code == 0 and "random, 2 trials" in result.out
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["search"]) == 2
    stages = {stage.name: stage for stage in plan(llama, recipe(text_file)).stages}
    assert stages["search"].tokens == 3 * 64 * 9
    weights = sum(p.numel() for p in halfweight.load(llama).parameters())
    assert stages["search"].device_gb > 1e-9 * 2 * (weights - 64 * 32)  # the embedding's rows are read on demand


# --- profiles ------------------------------------------------------------------------------------------------------


def test_a_profile_says_what_linears_read() -> None:
    settings = SelectionSettings.model_validate(
        {
            "sparsity": 0.5,
            "channels": 0.9,
            "profile": {
                "model.layers.1": {"sparsity": 0.3},
                "model.layers.1.mlp.up_proj": {"sparsity": 0.2, "channels": 1.0},
            },
        }
    )
    found = {
        name: settings.for_linear(name)
        for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.11.mlp.up_proj")
    }
    assert [(s.sparsity, s.channels) for s in found.values()] == [(0.2, 1.0), (0.3, 0.9), (0.5, 0.9)]
    assert all(not s.profile for s in found.values())
    where = Recipe.parse({"stages": [{"pass": "keep", "selection": settings.model_dump()}]})
    resolved = where.resolve(SHAPES)["model.layers.1.self_attn.q_proj"].selection
    assert resolved is not None and resolved.sparsity == 0.3
    with pytest.raises(InputError, match=r"selection\.profile fixes what each linear reads"):
        with_removed(where, 0.5)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_profile_for_no_linear_is_refused() -> None:
    stage = {"pass": "keep", "selection": {"sparsity": 0.5, "profile": {"model.layers.99": {"sparsity": 0.4}}}}
    assert "selection.profile: 'model.layers.99' holds no linear of this stage" in refusal(
        Recipe.parse({"stages": [stage]})
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {trials: 1}", "search.trials: Input should be greater than or equal to 2, got 1"),
        ("search: {trails: 9}", "search.trails: unknown key; did you mean 'trials'?"),
        (
            "search: {method: genetic}",
            "search.method: Input should be 'evolution', 'descent', 'tpe', 'cma' or 'random'",
        ),
        ("search: {vary: []}", "search.vary: Tuple should have at least 1 item"),
    ],
)
def test_bad_settings_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in failure(tmp_path, f"stages:\n- pass: keep\n  selection: {{sparsity: 0.5}}\n{text}\n")


def test_searches_without_anything_to_search_are_refused() -> None:
    pruning = Recipe.parse({"stages": [{"pass": "wanda"}], "search": {}})
    assert "search: no stage has a selection, so there is nothing to search" in refusal(pruning)
    with pytest.raises(InputError, match="search: nothing varies; it needs a selection with a branch"):
        space(recipe(search={"groups": 1}))
    with pytest.raises(InputError, match="search: nothing varies"):
        space(recipe(search={"vary": ["channels"]}))
    with pytest.raises(InputError, match="does not search; add --search evolution"):
        pruning.with_search("none").with_search(trials=4)
    with pytest.raises(InputError, match="--search 'evolutoin' is unknown; did you mean 'evolution'"):
        pruning.with_search("evolutoin")
    with pytest.raises(InputError, match=r"search\.trials: Input should be greater than or equal to 2, got 1"):
        pruning.with_search(trials=1)


def test_a_missing_package_is_named_before_any_work(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "halfweight.compress.search.strategies.find_spec", lambda name: None if name == "optuna" else real(name)
    )
    message = fails(InputError, llama, recipe(text_file, {"method": "tpe"}), tmp_path / "out")
    assert message == (
        "search method tpe needs the package optuna: pip install 'halfweight[search]'; or choose evolution"
    )
    assert not partial_of(tmp_path / "out").exists()


def test_methods_are_compared_at_equal_bytes(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("compare_selection")
    flags = [str(llama), "--calibration", text_file, "--text", text_file, "--out", tmp_path / "cells", "--windows", 2]
    flags += ["--seqlen", 64, "--samples", 2, "--calibration-seqlen", 32, "--trials", 2, "--search-samples", 1]
    flags += ["--search-seqlen", 32, "--prompts", 2, "--levels", 50, "--methods"]
    script.main([*map(str, flags), "teal"])
    flags += ["teal", "rsparse-random"]
    script.main(list(map(str, flags)))
    table = json.loads((tmp_path / "cells" / "results.json").read_text(encoding="utf-8"))
    teal, searched = table["cells"]
    assert teal["share"] == 1 and len(searched["search"]) == 2
    assert all(0 <= cell["agreement"] <= 1 for cell in table["cells"])
    increase = [math.log(cell["perplexity"] / table["dense"]["perplexity"]) for cell in (teal, searched)]
    assert searched["share"] == pytest.approx(increase[1] / increase[0])
    assert abs(teal["bytes_read_fraction"] - 0.5) < 0.1
    assert sorted(file.name for file in (tmp_path / "cells").iterdir()) == ["README.md", "results.json"]
    assert "rsparse-random" in (tmp_path / "cells" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(script, "compress_checkpoint", None)  # what is done is not done again
    capsys.readouterr()
    script.main(list(map(str, flags)))
    assert "rsparse-random" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds cells of another model, text or settings"):
        script.main([*map(str, flags), "--seed", "1"])


def test_shares_are_of_the_baseline_that_reads_as_much() -> None:
    def cell(method: str, perplexity: float, read: float) -> dict[str, Any]:
        return {"method": method, "perplexity": perplexity, "bytes_read_fraction": read}

    cells = [cell("teal", 80, 0.34), cell("teal", 40, 0.35), cell("wina", 20, 0.349), cell("wina", 20, 0.36)]
    shares = [row["share"] for row in load_script("compare_selection").with_shares(cells, {"perplexity": 10.0})]
    assert shares[:3] == pytest.approx([1, 1, 0.5]) and shares[3] is None


def test_searched_recipes_ship() -> None:
    for name in ("rsparse-50", "rsparse-65", "teal-65-fisher"):
        shipped = Recipe.load(named_recipes()[f"{name}-searched"])
        assert shipped.search == Search(method="evolution" if name.startswith("rsparse") else "descent")
