"""Input selection in whole runs: what loads, resumes and is exported, honest scoring, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halfweight
from commands import Cli, Result, ok, read
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress.plan import plan
from halfweight.compress.target import with_removed
from halfweight.eval import perplexity
from halfweight.eval.perplexity import evaluate, window_losses
from halfweight.eval.selection import inputs_read, selecting_tokens
from halfweight.serving.linear import CompressedLinear, SelectingLinear
from halfweight.serving.scheme import IntegerScheme, LinearScheme, SelectionScheme
from halfweight.serving.storage import Selection, pack_selection, selection_of
from halfweight.triton_kernels.formats.bits import from_bits
from recipe_cases import refusal, stages
from runs import contents, interrupt, stop_in_block

DENSE = LinearScheme(pattern="dense", density=1.0)
SELECTION = {"sparsity": 0.5}
INT4 = DENSE.model_copy(update={"integers": IntegerScheme(group_size=64, along="outputs")})
DENSE_BY_SIZE = DENSE.model_copy(update={"selection": SelectionScheme()})
Q = "model.layers.0.self_attn.q_proj"


def recipe(text: Path, **settings: Any) -> Recipe:
    stage = {"pass": "keep", "selection": {"sparsity": 0.4, **settings}}
    calibration = {"data": str(text), "samples": 8, "seqlen": 32}
    return Recipe.parse({"calibration": calibration, "stages": [stage], "prefill": "masked"})


# --- allocation ----------------------------------------------------------------------------------------------------


def test_a_greedy_run_keeps_the_budget_and_resumes(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, allocation="greedy")
    report = compress_checkpoint(llama, settings, tmp_path / "whole")
    even = compress_checkpoint(llama, recipe(text_file), tmp_path / "even")
    shares = []
    for run in (report, even):
        block = run.layers[:7]
        sizes = [layer.shape[0] * layer.shape[1] for layer in block]
        wanted = [layer.stats["inputs_wanted"] for layer in block]
        shares.append(sum(s * w for s, w in zip(sizes, wanted, strict=True)) / sum(sizes))
    assert shares[0] == pytest.approx(shares[1])
    assert len({round(layer.stats["inputs_wanted"], 3) for layer in report.layers[:7]}) > 2
    interrupt(llama, settings, tmp_path / "out", stop_in_block(1))
    assert compress_checkpoint(llama, settings, tmp_path / "out").blocks_resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, reading 60 % of the bytes: inputs by |x| times norm, and branches."""
    out = tmp_path_factory.mktemp("selected") / "out"
    report = compress_checkpoint(llama, recipe(text_file, score="l2", channels=0.8), out)
    assert all(0 < layer.error < 1 for layer in report.layers)
    differences = [layer.stats["inputs_read"] - layer.stats["inputs_wanted"] for layer in report.layers]
    assert sum(map(abs, differences)) / len(differences) < 0.05  # the dev set is one window of a tiny model
    return out


def plain(dense: Path, tensors: dict[str, Tensor], dense_tokens: int = 0) -> nn.Module:
    """The dense model with hooks that do by definition what the stored `tensors` say."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)

    def hook(name: str) -> Any:
        threshold, norms = (from_bits(tensors[f"{name}.{key}"])[0] for key in ("thresholds", "norms"))
        v, u = tensors[f"{name}.V"][0].float(), tensors[f"{name}.U"].float()

        def select(module: nn.Linear, args: tuple[Tensor], y: Tensor) -> Tensor:
            (x,) = args
            read = x.abs() * norms > threshold
            read[:, :dense_tokens] = True
            return (x * read) @ module.weight.T + (x * ~read) @ v @ u.T

        return select

    for name, module in model.named_modules():
        if f"{name}.thresholds" in tensors:
            module.register_forward_hook(hook(name))
    return model


def test_the_loaded_model_selects_as_defined(selected: Path, llama: Path, tmp_path: Path) -> None:
    model = halfweight.load(selected, dtype="float32")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(24)[None] % 7 + 3
    with torch.no_grad():
        got, want = model(ids).logits, plain(llama, state)(ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with selecting_tokens(model, 5) as reading:
            got = model(ids).logits
        torch.testing.assert_close(got, plain(llama, state, 5)(ids).logits, rtol=1e-4, atol=1e-4)
    assert reading.fraction is not None and abs(reading.fraction - 0.6) < 0.1
    halfweight.load(selected, dtype="bfloat16").save_pretrained(tmp_path / "again")
    again = halfweight.load(tmp_path / "again", dtype="float32").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_the_first_tokens_of_a_window_read_everything_in_calibration() -> None:
    dense, x = nn.Linear(8, 4), torch.randn(2, 5, 8)
    linear = SelectingLinear.like(dense)
    linear.selection = selection_of(DENSE_BY_SIZE, pack_selection(DENSE_BY_SIZE, Selection(100.0, None)))
    linear.dense_tokens = 2
    y, bias = linear(x), dense.bias.expand(2, 3, 4)
    torch.testing.assert_close(y, torch.cat([dense(x[:, :2]), bias], dim=1))  # nothing is above the threshold


def test_a_dense_prefill_reads_everything_but_in_decoding(
    selected: Path, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, score="l2", channels=0.8).model_dump(by_alias=True, exclude={"prefill"})
    compress_checkpoint(llama, Recipe.parse(settings), tmp_path / "out")
    masked, prefill = (halfweight.load(folder, dtype="float32") for folder in (selected, tmp_path / "out"))
    ids = torch.arange(24)[None] % 7 + 3
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(prefill(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prefill(ids[:, :1]).logits, masked(ids[:, :1]).logits)
        with selecting_tokens(prefill, 0):  # scores never depend on it
            torch.testing.assert_close(prefill(ids).logits, masked(ids).logits)
        torch.testing.assert_close(prefill(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_inspect_names_the_kernels(selected: Path) -> None:
    inspection = halfweight.inspect_checkpoint(selected, device="cpu", dtype="float32")
    assert {(layer.backend, layer.reason) for layer in inspection.layers} == {("cpu", "input_select kernels")}
    assert inspection.layers[0].numbers == "bfloat16, inputs by |x| norm + rank 2"
    model = halfweight.load(selected, dtype="bfloat16")
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    stored = sum(8 * t.nbytes for module in linears for t in module.stored().values())
    weights = sum(module.shape[0] * module.shape[1] for module in linears)
    assert inspection.effective_bits == pytest.approx(stored / weights)


@pytest.mark.parametrize(
    ("stage", "numbers"),
    [
        ({"pass": "gptq", "bits": 8, "group_size": 16, "along": "outputs"}, "int8 g16 along outputs, inputs by |x|"),
        ({"pass": "gqsa", "pattern": "8x1", "density": 0.5}, "int4 g8 along outputs, inputs by |x|"),
        ({"pass": "wanda", "pattern": "2:4"}, "bfloat16, inputs by |x|"),
    ],
    ids=["int8", "8x1", "2:4"],
)
def test_any_pass_may_select(stage: dict[str, Any], numbers: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"data": str(text_file), "samples": 4, "seqlen": 32}
    stage = {**stage, "selection": {"sparsity": 0.4, "channels": 0.7}}
    settings = Recipe.parse({"calibration": calibration, "stages": [stage]})
    report = compress_checkpoint(llama, settings, tmp_path / "out", dtype="float32")  # which reloads and compares
    inspection = halfweight.inspect_checkpoint(tmp_path / "out", device="cpu", dtype="float32")
    assert {layer.backend for layer in inspection.layers} == {"cpu"}
    assert inspection.layers[-1].numbers.startswith(numbers) and "rank" in inspection.layers[-1].numbers
    planned = plan(llama, settings)
    assert planned.effective_bits == pytest.approx(report.effective_bits) == pytest.approx(inspection.effective_bits)
    for layer in report.layers:
        assert layer.stats["inputs_wanted"] == pytest.approx(layer.stats["inputs_read"], abs=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": "topk"},
        {"threshold": "topk", "score": "l2", "channels": 0.8, "allocation": "greedy"},
        {"score": "gradient"},
        {"score": "gradient", "threshold": "topk", "channels": 0.8},
    ],
    ids=str,
)
def test_every_selector_goes_through_a_run(
    settings: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    chosen = recipe(text_file, **settings)
    report = compress_checkpoint(llama, chosen, tmp_path / "out", dtype="float32")  # which reloads and compares
    for layer in report.layers:
        tolerance = 0.01 if "threshold" in settings else 0.2  # the dev set is one window of a tiny model
        spread = 0.5 / layer.shape[1]
        assert abs(layer.stats["inputs_read"] - layer.stats["inputs_wanted"]) <= tolerance + spread
    model = halfweight.load(tmp_path / "out", dtype="float32")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert ("counts" in linears[Q].stored()) == ("threshold" in settings)
    with selecting_tokens(model, 0) as reading, torch.no_grad():
        model(torch.arange(24)[None] % 7 + 3)
    assert reading.fraction is not None and abs(reading.fraction - 0.6) < (0.02 if "threshold" in settings else 0.1)
    interrupt(llama, chosen, tmp_path / "again", stop_in_block(1), dtype="float32")
    assert compress_checkpoint(llama, chosen, tmp_path / "again", dtype="float32").blocks_resumed == 1
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_report_says_how_far_reading_is_from_what_was_aimed_at() -> None:
    stats = {
        "a": {"inputs_read": 0.53, "inputs_wanted": 0.5},
        "b": {"inputs_read": 0.6, "inputs_wanted": 0.7},
        "c": {"inputs_read": None, "inputs_wanted": 0.2},
        "d": {"damping": 0.01},
    }
    assert inputs_read(stats) == "56.5% on held-out text, aimed at 60.0%; farthest off b: 60.0% for 70.0%"
    assert inputs_read({"d": stats["d"]}) is None


def test_a_truncation_error_decides_how_much_is_read(llama: Path, text_file: Path, tmp_path: Path) -> None:
    loose, tight = (recipe(text_file, sparsity=0, score="l2", truncation=share) for share in (0.4, 0.1))
    reports = [compress_checkpoint(llama, one, tmp_path / str(i)) for i, one in enumerate((loose, tight))]
    for some, more in zip(*(report.layers for report in reports), strict=True):
        assert some.stats["inputs_read"] < more.stats["inputs_read"] and "inputs_wanted" not in some.stats
        assert more.error < some.error < 0.4
    (stage,) = with_removed(loose, 0.3).stages
    assert (stage.selection.truncation, stage.selection.sparsity) == (0.3, 0)


@pytest.mark.parametrize("to", ["dense", "w4"])
def test_exports_say_that_every_input_is_read(to: str, selected: Path, llama: Path, tmp_path: Path) -> None:
    report = halfweight.export_checkpoint(selected, to, tmp_path / to)
    assert report.statement[-1] == "14 linears read all their inputs, without thresholds and branches"
    if to == "dense":
        got, want = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / to, llama))
        assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_codes_along_outputs_are_rounded_anew_in_an_export(llama: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"data": str(text_file), "samples": 4, "seqlen": 32}
    stage = {"pass": "rtn", "group_size": 32, "along": "outputs", "selection": {"sparsity": 0.4}}
    compress_checkpoint(llama, Recipe.parse({"calibration": calibration, "stages": [stage]}), tmp_path / "out")
    report = halfweight.export_checkpoint(tmp_path / "out", "w4", tmp_path / "w4")
    assert any("14 linears are rounded anew" in line for line in report.statement)


def test_scoring_says_what_was_selected(selected: Path, llama: Path, text_file: Path) -> None:
    result = evaluate(selected, text_file, windows=2, seqlen=100)
    assert result.sparse_tokens == 0.99
    assert result.bytes_read_fraction is not None and abs(result.bytes_read_fraction - 0.6) < 0.1
    assert result.bits_read == pytest.approx(16 * result.bytes_read_fraction)  # of 16-bit weights
    dense = evaluate(llama, text_file, windows=2, seqlen=100)
    assert (dense.sparse_tokens, dense.bytes_read_fraction, dense.bits_read) == (None, None, None)
    every = evaluate(selected, text_file, windows=2, seqlen=100, sparse_tokens=0.0)
    assert every.perplexity == pytest.approx(dense.perplexity, rel=1e-5) and every.bytes_read_fraction is None
    assert result.perplexity != pytest.approx(dense.perplexity, rel=1e-4)


def test_interrupted_scoring_goes_on_and_ends_alike(
    selected: Path, text_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[float] = []

    def score(stop: int, *flags: Any) -> Result:
        """`eval` of four windows, stopped when it has scored `stop`."""

        def losses(model: Any, window: Tensor) -> Tensor:
            if len(scored) == stop:
                raise RunError("stopped")
            found = window_losses(model, window)
            scored.append(float(found.mean()))
            return found

        scored.clear()
        monkeypatch.setattr(perplexity, "window_losses", losses)
        return cli("eval", selected, "--text", text_file, "--windows", 4, "--seqlen", 60, *flags)

    def numbers(file: Path) -> dict[str, Any]:
        return {key: value for key, value in read(file).items() if key != "seconds"}

    file, partial = tmp_path / "eval.json", tmp_path / "eval.json.partial"
    ok(score(4, "--json", tmp_path / "whole.json"))
    assert score(3, "--json", file).err.endswith("error: stopped\n")
    with partial.open("r+", encoding="utf-8") as stream:  # the last line as a crash may leave it
        stream.truncate(partial.stat().st_size - 5)
    ok(score(2, "--json", file))
    assert len(scored) == 2
    assert numbers(file) == numbers(tmp_path / "whole.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "whole.json"]
    score(3, "--json", file)
    ok(score(4, "--json", file, "--sparse-tokens", 0.5))  # other settings: none of the three counts
    assert len(scored) == 4
    assert read(file)["sparse_tokens"] == 0.5


def test_an_interrupted_run_resumes_to_the_same_bytes(
    selected: Path, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    same = recipe(text_file, score="l2", channels=0.8)
    interrupt(llama, same, tmp_path / "out", stop_in_block(1))
    assert compress_checkpoint(llama, same, tmp_path / "out").blocks_resumed == 1
    assert contents(tmp_path / "out") == contents(selected)


# --- bad input -----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"pass": "keep"}, "the stage needs a selection"),
    ({"pass": "keep", "selection": {"sparsity": 1}}, "selection.sparsity"),
    ({"pass": "keep", "selection": {"sparsity": 0.5, "channels": 1.5}}, "selection.channels"),
    ({"pass": "keep", "selection": {"sparsity": 0.5, "channels": -0.1}}, "selection.channels"),
    ({"pass": "keep", "selection": {"sparsity": 0.5, "score": "cett"}}, "selection.score"),
    ({"pass": "keep", "selection": {"sparsity": 0.5, "threshold": "top"}}, "selection.threshold"),
    ({"pass": "keep", "selection": {}}, "selection: give sparsity, above 0, or truncation in its place"),
    (
        {"pass": "keep", "selection": {"sparsity": 0.5, "truncation": 0.1}},
        "selection: give sparsity, above 0, or trunc",
    ),
    ({"pass": "keep", "selection": {"truncation": 0.1}}, "truncation is of outputs of size .* not score: size"),
    (
        {"pass": "keep", "selection": {"truncation": 0.1, "score": "l2", "threshold": "topk"}},
        "truncation finds one threshold per linear, not threshold: topk",
    ),
    (
        {"pass": "keep", "selection": {"truncation": 0.1, "score": "l2", "channels": 0.9}},
        "truncation leaves no bytes to share; remove channels and allocation",
    ),
    (
        {"pass": "keep", "selection": {"sparsity": 0.5, "score": "gradient", "allocation": "fisher"}},
        "allocation: fisher does not collect the gradients of score: gradient",
    ),
    ({"pass": "keep", "selection": {"sparsity": 0.99, "score": "l2"}}, "sparsity 0.99 leaves no bytes for inputs"),
    ({"pass": "keep", "selection": SELECTION, "low_rank": {}}, "low_rank: beside a selection, selection.channels says"),
    ({"pass": "rtn", "selection": SELECTION}, "a selection needs integers along outputs"),
    ({"pass": "gqsa", "pattern": "1x8", "density": 0.5, "selection": SELECTION}, "along outputs it is 8x1"),
    ({"pass": "keep", "selection": SELECTION, "targets": ["q_proj"]}, "are fused by servers and must share one scheme"),
]


NOT_TRAINED = {
    "a branch for the inputs that are not read": {"pass": "keep", "selection": {**SELECTION, "channels": 0.9}},
    "inputs that a prompt chooses": {"pass": "keep", "selection": {"sparsity": 0.5, "threshold": "prompt"}},
    "integers along the outputs": {"pass": "rtn", "along": "outputs", "group_size": 16, "selection": SELECTION},
}


@pytest.mark.parametrize("words", NOT_TRAINED)
def test_what_tuning_cannot_train_is_refused(words: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"calibration": {"data": str(text_file), "samples": 8, "seqlen": 32}, "stages": [NOT_TRAINED[words]]}
    with pytest.raises(InputError, match=f"tuning: .*q_proj has {words}, which tuning cannot train"):
        compress_checkpoint(llama, Recipe.parse({**settings, "tuning": {"block": {}}}), tmp_path / "out")


@pytest.mark.parametrize(("stage", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_refused_in_one_line(
    stage: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        settings = {"calibration": {"data": str(text_file), "samples": 8, "seqlen": 32}, "stages": [stage]}
        compress_checkpoint(llama, Recipe.parse(settings), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_fused_parts_are_selected_alike() -> None:
    selection = {"sparsity": 0.5}
    others = {"pass": "keep", "targets": ["q_proj", "k_proj"], "selection": {**selection, "threshold": "topk"}}
    message = refusal(stages(others, {"pass": "keep", "targets": ["v_proj"], "selection": selection}))
    assert "q_proj, k_proj, v_proj are fused by servers and must share one scheme" in message
