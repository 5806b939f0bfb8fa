"""Search for what selections read: budgets, strategies, the fitness, whole runs, resume, and bad input."""

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
from halfweight.compress.search.space import Budget, Space, project
from halfweight.compress.search.strategies import evolution, strategy
from halfweight.compress.target import with_removed
from halfweight.eval.metrics import kl_divergence
from halfweight.eval.report import write_page
from recipe_cases import MLP, SHAPES, failure, refusal
from runs import Stop, contents, fails, interrupt, partial_of

BLOCKS = [{n: s for n, s in SHAPES.items() if n.startswith(f"model.layers.{i}.")} for i in range(12)]
KEEP = {"pass": "keep", "selection": {"sparsity": 0.5}}
METHODS = ["evolution", "random", "tpe", "cma"]


def recipe(text: Path | None = None, search: dict[str, Any] | None = None, **selection: Any) -> Recipe:
    stage = {"pass": "keep", "selection": {"sparsity": 0.5, **selection}}
    calibration = {} if text is None else {"data": str(text), "samples": 8, "seqlen": 32}
    search = {"trials": 8, "population": 4, "samples": 3, "seqlen": 64, **(search or {})}
    return Recipe.parse({"calibration": calibration, "stages": [stage], "search": search})


def space(settings: Recipe) -> Space:
    assert settings.search is not None
    return Space(settings.search, settings.resolve(SHAPES), BLOCKS)


def bits_unread(where: Space, budgets: dict[str, Budget]) -> float:
    return sum(member.bits * budgets[name].sparsity for name, member in where.members.items())


def need(method: str) -> None:
    for package in {"tpe": ["optuna"], "cma": ["optuna", "cmaes"]}.get(method, []):
        pytest.importorskip(package)


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [{}, {"score": "l2", "channels": 0.9}, {"sparsity": 0.8, "score": "l1"}], ids=str)
def test_every_point_keeps_the_budget(selection: dict[str, Any]) -> None:
    where = space(recipe(**selection))
    assert [len(blocks) for blocks in where.groups].count(2) == 2 and len(where.groups) == 10
    assert sorted(block for blocks in where.groups for block in blocks) == list(range(12))
    start = bits_unread(where, {name: member.start for name, member in where.members.items()})
    generator = torch.Generator().manual_seed(0)
    corners = [[0.0] * where.size, [1.0] * where.size, *torch.rand(20, where.size, generator=generator).tolist()]
    corners += torch.rand(20, where.size, generator=generator).round().tolist()
    for point in corners:
        budgets = where.budgets(point, {})
        assert bits_unread(where, budgets) == pytest.approx(start, rel=1e-10)
        for name, member in where.members.items():
            assert member.low <= budgets[name].sparsity <= member.high and 0.5 <= budgets[name].channels <= 1
            split = member.split(budgets[name])  # what the budget pays for fills it to the last bit
            n, k = member.shape
            beside = 32 * (1 + k * (member.settings.score != "size")) + 16 * (n + k) * split.rank
            assert split.inputs * member.bits + beside == pytest.approx((1 - budgets[name].sparsity) * member.bits)
            assert split.rank <= where.largest_rank(member)
    middle = where.budgets([0.5] * where.size, {})
    assert middle == {name: member.start for name, member in where.members.items()}


def test_greedy_blocks_are_divided_by_their_curves_within_their_share() -> None:
    where = space(recipe(allocation="greedy", search={"groups": 12}))
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    tails = {name: name.rpartition(".")[2] for name in where.members}
    curves = {
        block: {name: {level: level**2 * (9 if tails[name] in MLP else 1) for level in levels} for name in names}
        for block, names in enumerate(BLOCKS)
    }
    generator = torch.Generator().manual_seed(0)
    for point in ([0.5] * 12, torch.rand(12, generator=generator).tolist()):
        plain, divided = where.budgets(point, {}), where.budgets(point, curves)
        for names in BLOCKS:
            shares = [
                sum(where.members[name].bits * found[name].sparsity for name in names) for found in (plain, divided)
            ]
            assert shares[0] == pytest.approx(shares[1], rel=1e-10)
        q, up = (divided[f"model.layers.3.{name}"].sparsity for name in ("self_attn.q_proj", "mlp.up_proj"))
        assert q > up


def test_a_projection_is_the_nearest_point() -> None:
    wanted, weights = {"a": 0.9, "b": 0.2, "c": 0.4}, {"a": 1, "b": 2, "c": 3}
    got = project(wanted, {"a": (0.0, 0.95), "b": (0.0, 1.0), "c": (0.0, 1.0)}, weights, 3.6)
    assert sum(weights[name] * got[name] for name in got) == pytest.approx(3.6, abs=1e-12)
    assert got["a"] == 0.95 and got["b"] - 0.2 == pytest.approx(got["c"] - 0.4)
    assert project(wanted, dict.fromkeys(wanted, (0.0, 1.0)), weights, 2.5) == wanted


def test_channels_alone_vary_as_in_the_paper() -> None:
    where = space(recipe(channels=0.95, search={"vary": ["channels"]}))
    assert where.size == 10
    budgets = where.budgets([0.0, 1.0, *[0.5] * 8], {})
    assert {budget.sparsity for budget in budgets.values()} == {0.5}
    first, second = (budgets[f"model.layers.{block}.mlp.up_proj"].channels for block in (0, 1))
    assert (first, second) == (1.0, pytest.approx(0.5))


# --- strategies ----------------------------------------------------------------------------------------------------


def run(settings: Search, size: int, objective: Callable[[torch.Tensor], torch.Tensor]) -> list[list[float]]:
    steps = strategy(settings, size)
    points = [next(steps)]
    while len(points) < settings.trials:
        points.append(steps.send(float(objective(torch.tensor(points[-1])))))
    return points


def bowl(point: torch.Tensor) -> torch.Tensor:
    return (point - torch.linspace(0.2, 0.9, len(point))).square().sum()


@pytest.mark.parametrize("method", METHODS)
def test_a_strategy_starts_in_the_middle_and_repeats_itself(method: str) -> None:
    need(method)
    settings = Search.model_validate({"method": method, "trials": 30})
    points = run(settings, 6, bowl)
    assert points[0] == [0.5] * 6 and len({tuple(point) for point in points}) == 30
    assert all(0 <= x <= 1 for point in points for x in point)
    assert run(settings, 6, bowl) == points
    assert run(settings.model_copy(update={"seed": 1}), 6, bowl)[1:] != points[1:]


@pytest.mark.parametrize("method", ["evolution", "tpe", "cma"])
def test_a_search_beats_the_start_and_the_control(method: str) -> None:
    need(method)

    def best(method: str, seed: int) -> float:
        settings = Search.model_validate({"method": method, "trials": 64, "seed": seed})
        return min(float(bowl(torch.tensor(point))) for point in run(settings, 10, bowl))

    found, control = (sum(best(name, seed) for seed in range(5)) / 5 for name in (method, "random"))
    assert found < 0.6 * float(bowl(torch.full((10,), 0.5))) and found < 0.9 * control


def test_parents_are_the_best_so_far() -> None:
    """Elitism: with mutations off, a child's coordinates are those of the best `population` trials."""
    settings = Search(population=3, trials=40)
    steps = evolution(settings, 40)
    points = [next(steps)]
    values = []
    for _ in range(39):
        values.append(float(bowl(torch.tensor(points[-1]))))
        points.append(steps.send(values[-1]))
        if len(points) > 4:
            elite = [points[i] for i in sorted(range(len(values)), key=values.__getitem__)[:3]]
            kept = sum(any(x == parent[i] for parent in elite) for i, x in enumerate(points[-1]))
            assert kept >= 15  # two in three on average


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
        ("search: {method: genetic}", "search.method: Input should be 'evolution', 'tpe', 'cma' or 'random'"),
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
    flags += ["--search-seqlen", 32, "--levels", 50, "--json", tmp_path / "table.json"]
    flags += ["--methods", "teal", "rsparse-random"]
    script.main(list(map(str, flags)))
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    teal, searched = table["cells"]
    assert teal["share"] == 1 and len(searched["search"]) == 2
    increase = [math.log(cell["perplexity"] / table["dense"]["perplexity"]) for cell in (teal, searched)]
    assert searched["share"] == pytest.approx(increase[1] / increase[0])
    assert abs(teal["bytes_read_fraction"] - 0.5) < 0.1
    assert sorted(file.name for file in (tmp_path / "cells").iterdir()) == [
        "dense.json",
        "rsparse-random-50.json",
        "settings.json",
        "teal-50.json",
    ]
    monkeypatch.setattr(script, "compress_checkpoint", None)  # what is done is not done again
    capsys.readouterr()
    script.main(list(map(str, flags)))
    assert "rsparse-random" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds cells of another model, text or settings"):
        script.main([*map(str, flags), "--seed", "1"])


def test_searched_recipes_ship() -> None:
    for name in ("rsparse-50-searched", "rsparse-65-searched"):
        shipped = Recipe.load(named_recipes()[name])
        assert shipped.search == Search()
