"""Tuning in whole runs: what it gains, what it never costs, and what is left when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint, plan
from halfweight.compress.blocks import BlockWalker
from halfweight.compress.calibration import load_windows
from halfweight.compress.recipe import named_recipes
from halfweight.compress.report import CompressionReport, OnProgress, Progress
from halfweight.compress.tuning import checkpoint
from halfweight.compress.tuning.end_to_end import _Training
from halfweight.compress.tuning.teacher import divergence, log_probabilities
from halfweight.compress.tuning.training import batches, look_steps, schedule
from halfweight.eval.selection import dense_tokens_of, selecting_tokens
from halfweight.serving.load import load_tokenizer
from halfweight.serving.scheme import ArtifactConfig
from runs import Stop, contents, fails, interrupt, parsed

STAGE = {"pass": "rtn", "group_size": 16, "bits": 3}
BLOCK = {"epochs": 2, "batch": 1, "evaluations": 2, "rates": {"weights": 0.01, "scales": 0.005}}
END_TO_END = {"epochs": 3, "evaluations": 3, "checkpoint_every": 2, "rates": {"scales": 0.01}, "top_k": 8}


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama of two blocks, wide enough for 1024 tokens in one pass."""
    return make_model("llama", max_position_embeddings=512)


def recipe(text_file: Path, stage: dict[str, Any] = STAGE, **tuning: Any) -> Recipe:
    """Four calibration windows of 512 tokens, two to a batch, and two more to tune on."""
    base = parsed(text_file, stage, seqlen=512, samples=4)
    return Recipe.parse({**base.model_dump(by_alias=True), "tuning": {"samples": 6, **tuning}})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def both(dense: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressionReport]:
    """An uninterrupted run of both stages."""
    out = tmp_path_factory.mktemp("both") / "out"
    return out, compress_checkpoint(dense, recipe(text_file, block=BLOCK, end_to_end=END_TO_END), out)


# --- what it gains -------------------------------------------------------------------------------------------------


def test_both_stages_lower_the_dev_loss_and_leave_masks_and_formats_alone(
    both: tuple[Path, CompressionReport], dense: Path, text_file: Path, tmp_path: Path
) -> None:
    out, report = both
    plain = compress_checkpoint(dense, recipe(text_file, block=BLOCK).with_tuning("none"), tmp_path / "plain")
    blocks, (whole,) = report.tuning[:-1], report.tuning[-1:]
    assert [row.stage for row in report.tuning] == ["block", "block", "end_to_end"]
    assert all(row.best < row.start and row.note is None for row in report.tuning)
    assert all(row.best == min(loss for _, loss in row.losses) for row in report.tuning)
    assert blocks[0].tokens == 2 * 6 * 512 and whole.tokens == 3 * 6 * 512
    assert report.verification.relative_difference == 0
    before, after = tensors_of(tmp_path / "plain"), tensors_of(out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.rpartition(".")[2] in ("codes", "scales", "zeros") for name in changed)
    assert ArtifactConfig.parse(halfweight.serving.checkpoint.Checkpoint(out).config["quantization_config"], "x")
    assert not [f for f in out.iterdir() if f.name.startswith(("block-", "tuned-", "teacher", "training"))]
    assert report.effective_bits == plain.effective_bits


def test_stage_two_alone_moves_scales_and_nothing_else(dense: Path, text_file: Path, tmp_path: Path) -> None:
    rates = {"weights": 0.9, "scales": 0.01}  # codes would change, if they could
    end_to_end = {**END_TO_END, "epochs": 1, "distill": 0.0, "rates": rates}
    settings = recipe(text_file, block=BLOCK, end_to_end=end_to_end)
    report = compress_checkpoint(dense, settings.with_tuning("end-to-end"), tmp_path / "out")
    compress_checkpoint(dense, settings.with_tuning("none"), tmp_path / "plain")
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scales"}
    assert [row.stage for row in report.tuning] == ["end_to_end"]


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text"])
def test_other_architectures_norms_branches_and_rounded_tables(
    name: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    stage = {"pass": "wanda", "pattern": "2:4", "low_rank": {"fraction": 0.5}}
    train = ["weights", "branch", "norms"]
    block = {**BLOCK, "epochs": 6, "train": train, "units": "separately"}
    tuning = {"block": block, "end_to_end": {"epochs": 3, "train": train}}
    base = parsed(text_file, stage, seqlen=64, samples=4)
    settings = Recipe.parse({**base.model_dump(by_alias=True), "tuning": tuning, "embeddings": {"group_size": 16}})
    dense = make_model(name)
    report = compress_checkpoint(dense, settings, tmp_path / "out")
    assert all(row.best <= row.start and row.note is None for row in report.tuning)
    assert any(row.best < row.start for row in report.tuning)
    assert report.verification.relative_difference == 0
    before, after = tensors_of(dense), tensors_of(tmp_path / "out")
    norms = [n for n in after if "norm" in n and n.endswith("weight")]
    assert any(not torch.equal(before[n], after[n]) for n in norms)


def test_inputs_are_selected_while_weights_are_trained(dense: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"pass": "keep", "selection": {"sparsity": 0.6}}
    tuning = {"block": BLOCK, "end_to_end": {**END_TO_END, "rates": {"weights": 0.003}}}
    settings = recipe(text_file, stage, **tuning)
    report = compress_checkpoint(dense, settings, tmp_path / "out")
    assert all(row.best < row.start and row.note is None for row in report.tuning)
    assert report.verification.relative_difference == 0
    for stop in (stop_when("end_to_end", 3), stop_when("shares", 1, "layers.1")):
        interrupt(dense, settings, tmp_path / "again", stop)
    compress_checkpoint(dense, settings, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    plain = compress_checkpoint(dense, settings.with_tuning("none"), tmp_path / "plain")
    assert report.dev.compressed < plain.dev.compressed  # both with their inputs selected
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    kinds = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert "weight_t" in kinds and kinds <= {"weight_t", "thresholds"}


@pytest.mark.parametrize("score", ["size", "l2"])
def test_trained_linears_read_their_share(dense: Path, text_file: Path, tmp_path: Path, score: str) -> None:
    selecting = {"sparsity": 0.6, "score": score, "allocation": "greedy"}
    train: dict[str, Any] = {"train": ["weights", "norms"], "rates": {"weights": 0.03, "norms": 0.1}}
    tuning = {"block": {**BLOCK, **train}, "end_to_end": {**END_TO_END, **train, "patience": 9}}
    settings = recipe(text_file, {"pass": "keep", "selection": selecting}, **tuning)
    report = compress_checkpoint(dense, settings, tmp_path / "out", dtype="float32")
    wanted = {layer.name: layer.stats["inputs_wanted"] for layer in report.layers}
    model = halfweight.load(tmp_path / "out", dtype="float32")
    shares: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for name in wanted:
        linear = model.get_submodule(name)
        tensors = dict(linear.named_buffers())
        threshold = tensors["thresholds"].view(torch.float32)
        norms = tensors["norms"].view(torch.float32)[0] if score == "l2" else 1.0

        def see(module: nn.Module, args: Any, name: str = name, cut: Tensor = threshold, by: Any = norms) -> None:
            shares[name].append((args[0].abs() * by > cut).float().mean())

        linear.register_forward_pre_hook(see)
    windows = load_windows(settings.calibration, load_tokenizer(dense), dense, 512, tuning=6)
    with torch.no_grad(), selecting_tokens(model, dense_tokens_of(512)):
        model(torch.stack(windows.calibration))
    for name, share in wanted.items():
        assert float(torch.stack(shares[name]).mean()) == pytest.approx(share, abs=0.005), name


# --- the gradients of stage 2, against the whole model's -----------------------------------------------------------


def test_gradients_are_those_of_the_whole_model(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["weights", "norms"]
    settings = recipe(text_file, {"pass": "wanda", "pattern": "2:4"}, end_to_end={"train": train, "distill": 0.0})
    seen: dict[str, Tensor] = {}

    def step(self: _Training) -> float:
        self.gradients([0])
        units = {f"{b.prefix}.{n}": m for b in self.student.blocks for n, m in b.weights.items()}
        for name, module in units.items():
            inner = getattr(module, "weight", module)
            seen[name] = inner.values.grad / inner.size
        self.finished = True
        return 0.0

    monkeypatch.setattr(_Training, "step", step)
    out = tmp_path / "out"
    compress_checkpoint(dense, settings, out, dtype="float32")
    model = halfweight.load(out, dtype="float32")
    halfweight.serving.linear.expand_linears(model, torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = torch.stack(training_windows(settings, dense)[:2])
    logits = model(input_ids=batch).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    assert len(seen) == 2 * (7 + 2)
    for name, grad in seen.items():
        weight = model.get_parameter(name)
        wanted = weight.grad * (weight != 0) if grad.ndim == 2 else weight.grad
        torch.testing.assert_close(grad, wanted, rtol=2e-3, atol=2e-6)


def test_the_divergence_and_its_gradient_are_those_of_whole_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, logits = 3 * torch.randn(2, 6, 40, generator=generator, dtype=torch.float64)
    values, tokens = teacher.log_softmax(-1).topk(5)
    target = torch.randint(0, 40, (6,), generator=generator)
    logits.requires_grad_()

    def folded(log_probs: Tensor) -> Tensor:
        """The five tokens' log probabilities, and that of all others together."""
        others = log_probs.exp().sum(-1) - log_probs.gather(-1, tokens).exp().sum(-1)
        return torch.cat([log_probs.gather(-1, tokens), others.log()[:, None]], 1)

    said = log_probabilities(logits, torch.cat([tokens, target[:, None]], 1))
    found = 0.7 * divergence(said[:, :-1], values) - 0.3 * said[:, -1]
    apart = torch.nn.functional.kl_div(
        folded(logits.log_softmax(-1)), folded(teacher.log_softmax(-1)), reduction="none", log_target=True
    )
    wanted = 0.7 * apart.sum(-1) + 0.3 * torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads)


def training_windows(settings: Recipe, dense: Path) -> list[Tensor]:
    """The windows that a run by `settings` trains on."""
    return load_windows(settings.calibration, halfweight.load_tokenizer(dense), dense, tuning=6).all


# --- interruption --------------------------------------------------------------------------------------------------


def stop_when(stage: str, done: int, word: str = "loss") -> OnProgress:
    def progress(step: Progress) -> None:
        if step.stage == stage and step.done == done and word in step.detail:
            raise Stop

    return progress


def test_runs_stopped_in_either_stage_resume_to_the_same_bytes(
    both: tuple[Path, CompressionReport], dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", recipe(text_file, block=BLOCK, end_to_end=END_TO_END)
    interrupt(dense, settings, out, stop_when("blocks", 1, "tuning"))
    partial = interrupt(dense, settings, out, stop_when("end_to_end", 3))
    assert (partial / checkpoint.FILE).is_file()
    steps: list[int] = []

    def note(step: Progress) -> None:
        if step.stage == "end_to_end" and "loss" in step.detail:
            steps.append(step.done)
            if step.done == 5:
                raise Stop

    interrupt(dense, settings, out, note)
    assert steps == [3, 4, 5]  # two steps were saved
    interrupt(dense, settings, out, stop_when("verify", 0, ""))
    report = compress_checkpoint(dense, settings, out, progress=stop_when("end_to_end", 1))
    assert contents(out) == contents(both[0])
    assert report.dev == both[1].dev
    timeless = [[row.model_copy(update={"seconds": 0}) for row in r.tuning] for r in (report, both[1])]
    assert timeless[0] == timeless[1]


def test_a_damaged_or_foreign_checkpoint_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / checkpoint.FILE
    assert checkpoint.load(file, "run") is None
    checkpoint.save(file, "run", {"a": torch.arange(64.0), "step": torch.tensor(3.0)}, {"done": 3, "loss": 0.1 + 0.2})
    found = checkpoint.load(file, "run")
    assert found is not None and found[1] == {"done": 3, "loss": 0.1 + 0.2}
    assert torch.equal(found[0]["a"], torch.arange(64.0))
    assert checkpoint.load(file, "another") is None
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert checkpoint.load(file, "run") is None
    file.write_bytes(whole[:50])
    assert checkpoint.load(file, "run") is None


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["block", "end_to_end"])
def test_a_loss_that_is_not_finite_leaves_the_start(
    stage: str, dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(text_file, block=BLOCK, end_to_end=END_TO_END)
    settings = settings.with_tuning(stage.replace("_", "-"))
    compress_checkpoint(dense, settings.with_tuning("none"), tmp_path / "plain")
    call = BlockWalker.call

    def poisoned(self: BlockWalker, index: int, block: Any, x: Tensor, weights: Any) -> Tensor:
        y = call(self, index, block, x, weights)
        return y * float("nan") if torch.is_grad_enabled() and weights and index == 1 else y

    monkeypatch.setattr(BlockWalker, "call", poisoned)
    report = compress_checkpoint(dense, settings, tmp_path / "out")
    assert "not finite at step 1" in str(report.tuning[-1].note)
    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    last = [name for name in before if ".layers.0." not in name or stage == "end_to_end"]
    assert all(torch.equal(before[name], after[name]) for name in last)


def test_nothing_to_train_is_said_and_changes_nothing(dense: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, block={"train": ["branch"]}, end_to_end={"train": ["branch"]})
    report = compress_checkpoint(dense, settings, tmp_path / "out")
    assert {row.note for row in report.tuning} == {"there is nothing to train"}
    assert all(row.steps == 0 and row.best == row.start for row in report.tuning)
    assert CompressionReport.model_validate_json((tmp_path / "out/report.json").read_text()) == report


@pytest.mark.parametrize("stage", ["block", "end_to_end"])
def test_too_little_memory_means_smaller_pieces_and_then_one_clear_line(
    stage: str, dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(text_file, block={**BLOCK, "epochs": 1}, end_to_end={**END_TO_END, "epochs": 1})
    settings = settings.with_tuning(stage.replace("_", "-"))
    call, sizes, most = BlockWalker.call, [], 1

    def scarce(self: BlockWalker, index: int, block: Any, x: Tensor, weights: Any) -> Tensor:
        if torch.is_grad_enabled() and weights and x.shape[1] == 512:
            sizes.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, index, block, x, weights)

    monkeypatch.setattr(BlockWalker, "call", scarce)
    report = compress_checkpoint(dense, settings, tmp_path / "out")
    assert sizes[:3] == [2, 1, 1]
    assert sizes.count(2) == sum(row.stage == stage for row in report.tuning)  # each stretch tries once
    assert all(row.note is None and row.best < row.start for row in report.tuning)
    most = 0
    line = fails(RunError, dense, settings, tmp_path / "none")
    assert "one window of 512 tokens" in line and "--seqlen" in line
    assert not (tmp_path / "none").exists()


# --- recipes and plans ---------------------------------------------------------------------------------------------

BEST = [name for name in named_recipes() if name.endswith("-best")]
ALIKE = {"2of4-best": "2of4-admm", "teal-65-best": "teal-65-fisher-searched"}  # with the same stages


def test_the_best_recipes_tune_alike_and_compress_as_the_recipe_they_are_named_after() -> None:
    costs = set()  # rates may differ, what the tuning spends may not
    for name in BEST:
        tuned = Recipe.load(name)
        assert tuned.tuning is not None and tuned.tuning.block is not None and tuned.tuning.end_to_end is not None
        stages = (tuned.tuning.block, tuned.tuning.end_to_end)
        costs.add((tuned.tuning.samples, tuned.calibration, *((stage.epochs, stage.batch) for stage in stages)))
        plain = Recipe.load(ALIKE.get(name, name.removesuffix("-best")))
        # In time for tuning, the densities of groups are divided first.
        stages = [s.model_copy(update={"allocation": "uniform"}) if "gqsa" in name else s for s in tuned.stages]
        assert stages == list(plain.stages)
    assert len(costs) == 1


def test_flags_choose_stages_and_settings() -> None:
    best = Recipe.load("w4-g64-best")
    changed = best.with_tuning("block", samples=7, block_epochs=3).tuning
    assert changed is not None and changed.end_to_end is None and changed.block is not None
    assert (changed.samples, changed.block.epochs) == (7, 3)
    assert best.with_tuning() == best
    assert best.with_tuning("none") == best.model_copy(update={"tuning": None})
    added = Recipe.load("w4-g64").with_tuning("both", end_to_end_epochs=2).tuning
    assert added is not None and added.end_to_end is not None and added.end_to_end.epochs == 2
    for wrong, words in {
        ("blok", None): "did you mean 'block'",
        ("none", 3): "add --tuning both",
    }.items():
        with pytest.raises(InputError, match=words):
            best.with_tuning(wrong[0], samples=wrong[1])
    with pytest.raises(InputError, match="add --tuning end-to-end"):
        best.with_tuning("block", end_to_end_epochs=2)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "tuning needs"),
        ({"block": {"epoch": 1}}, "tuning.block.epoch: unknown key; did you mean 'epochs'"),
        ({"block": {"rates": {"weight": 1}}}, "did you mean 'weights'"),
        ({"end_to_end": {"train": ["scale"]}}, "got 'scale'"),
        ({"end_to_ends": {}}, "did you mean 'end_to_end'"),
    ],
)
def test_a_bad_tuning_section_is_one_line_that_names_it(section: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse({"stages": [STAGE], "tuning": section})
    assert words in str(error.value) and "\n" not in str(error.value)


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_8b_parameters_are_planned_from_the_config_alone_and_fit_24_gb(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    for name in ("w4-g64-best", "2of4-w4-best", "gqsa-w4s50-best"):
        planned = plan(tmp_path, name, dtype="bfloat16", device="cpu")
        before = ["basis", "allocation"] if name == "gqsa-w4s50-best" else []
        assert [stage.name for stage in planned.stages] == [*before, "metric", "compress", "block", "end_to_end"]
        assert planned.parameters == 8_030_261_248
        assert max(stage.device_gb for stage in planned.stages) < 23
        assert all(stage.seconds > 0 and stage.host_gb < 16 and stage.disk_gb < 20 for stage in planned.stages)
    whole = plan(tmp_path, "2of4-best", dtype="bfloat16", device="cpu").stages[-1]
    assert whole.device_gb > 24  # AdamW over all 16-bit weights: said beforehand, not found out


def test_a_model_without_weights_is_planned_and_not_compressed(tmp_path: Path, small_recipe: Recipe) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    assert "no safetensors weights" in fails(InputError, tmp_path, small_recipe, tmp_path / "out")


# --- the schedule --------------------------------------------------------------------------------------------------


def test_the_schedule_rises_falls_and_ends_at_a_twentieth() -> None:
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == 1.0 and 0.05 <= factors[-1] < 0.06
    assert look_steps(10, 4) == {2, 5, 8, 10} and look_steps(2, 8) == {1, 2}
    order = batches(5, 2, 2, seed=0)
    assert [len(step) for step in order] == [2, 2, 1, 2, 2, 1]
    assert sorted(i for step in order[:3] for i in step) == list(range(5))
    assert order != batches(5, 2, 2, seed=1) and order == batches(5, 2, 2, seed=0)
