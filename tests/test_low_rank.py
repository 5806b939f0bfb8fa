"""Low-rank branches: what they win, how they are rounded, stored, loaded, saved again, counted and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from halfweight import InputError, Recipe, compress_checkpoint
from halfweight.compress.passes import PASSES, low_rank
from halfweight.compress.passes.base import PruneResult
from halfweight.compress.plan import plan
from halfweight.serving.inspect import inspect_checkpoint
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import IntegerScheme, LinearScheme, LowRankScheme
from halfweight.serving.storage import effective_weight, pack_branch, pack_weight, tensor_specs
from halfweight.serving.warmup import warmup
from problems import output_error, problem, statistics_of
from runs import contents

IDS = torch.arange(3, 27)[None]
Q = "model.layers.0.self_attn.q_proj"
STAGES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "admm": {},
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4, "group_size": 16},
    "gqsa": {"pattern": "2:4", "group_size": 16},
}
BRANCHES: dict[str, dict[str, Any]] = {
    "16-bit": {"fraction": 0.5},
    "int8": {"fraction": 0.5, "bits": 8},
    "int4": {"fraction": 0.5, "bits": 4, "group_size": 16},
}


def solve(name: str, weight: Tensor, x: Tensor, branch: dict[str, Any] | None, **settings: Any) -> PruneResult:
    config = PASSES[name].config(**STAGES[name], low_rank=branch, **settings)
    return low_rank.solve(PASSES[name], weight, statistics_of(x), config, torch.bfloat16)


def effective(result: PruneResult) -> Tensor:
    assert result.branch is not None
    return result.weight + result.branch.u @ result.branch.v.T


def recipe_for(text_file: Path, branch: dict[str, Any] | None, name: str = "gqsa") -> Recipe:
    calibration = {"data": str(text_file), "samples": 8, "seqlen": 32}
    stages = [{"pass": name, **STAGES[name], "low_rank": branch}]
    return Recipe.parse({"name": "small", "calibration": calibration, "stages": stages})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# --- the solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", STAGES)
def test_a_branch_lowers_every_pass_output_error(name: str, branch: str) -> None:
    weight, x = problem(0, tokens=400, size=64, rows=48)
    alone = solve(name, weight, x[:300], None)
    assert alone.branch is None
    result = solve(name, weight, x[:300], BRANCHES[branch])
    assert torch.equal(result.weight.bool() & ~result.mask, torch.zeros_like(result.mask))
    for part in (x[:300], x[300:]):
        assert output_error(part, weight, effective(result)) < 0.7 * output_error(part, weight, alone.weight)
    assert result.stats["error"] < 0.7 * result.stats["error_without_branch"]


def test_working_on_what_the_branch_leaves_beats_the_branch_alone() -> None:
    weight, x = problem(1, tokens=400, size=64, rows=48)
    result = solve("gptq", weight, x, BRANCHES["16-bit"])
    alone = PASSES["gptq"].solve(weight, statistics_of(x), PASSES["gptq"].config(**STAGES["gptq"]))
    hessian = statistics_of(x).hessian
    v = low_rank.input_directions(weight - alone.weight, hessian, 24)
    u = low_rank.fit_outputs(weight - alone.weight, hessian, v)
    assert output_error(x, weight, effective(result)) < output_error(x, weight, alone.weight + u @ v.T)


def test_the_directions_are_those_of_the_whitened_svd() -> None:
    residual, x = problem(2, tokens=2000, size=64, rows=48)
    hessian = statistics_of(x).hessian
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(damped.double())
    u, s, vt = torch.linalg.svd(residual.double() @ factor)
    best = (u[:, :16] * s[:16]) @ vt[:16] @ torch.linalg.inv(factor)
    v = low_rank.input_directions(residual, hessian, 16)
    mine = low_rank.fit_outputs(residual, damped, v) @ v.T
    lost = [float(((m.double() - residual) @ factor).square().sum()) for m in (best, mine)]
    assert lost[0] <= lost[1] * (1 + 1e-6) and lost[1] < lost[0] * 1.02


def test_a_branch_of_full_rank_leaves_nothing() -> None:
    weight, x = problem(3, size=32, rows=16)
    result = solve("magnitude", weight, x, {"fraction": 1.0})
    assert output_error(x, weight, effective(result)) < 1e-3 * output_error(x, weight, result.weight)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = problem(4, size=64, rows=48)
    x[:, ::5] = 0
    result = solve("gqsa", weight, x, BRANCHES["int8"])
    assert bool(effective(result).isfinite().all())
    assert output_error(x, weight, effective(result)) < output_error(x, weight, solve("gqsa", weight, x, None).weight)


# --- storage -------------------------------------------------------------------------------------------------------

SCHEMES = {
    "16-bit": LowRankScheme(rank=16),
    "int8": LowRankScheme(rank=16, integers=IntegerScheme(bits=8, group_size=64, symmetric=True)),
    "int4": LowRankScheme(rank=16, integers=IntegerScheme(bits=4, group_size=16, symmetric=True)),
}


@pytest.mark.parametrize("branch", SCHEMES)
def test_what_is_stored_is_what_was_solved(branch: str) -> None:
    weight, x = problem(5, tokens=300, size=64, rows=48)
    result = solve("gqsa", weight, x, {**BRANCHES[branch], "fraction": 0.3})
    scheme = PASSES["gqsa"].config(**STAGES["gqsa"], low_rank={**BRANCHES[branch], "fraction": 0.3}).scheme((48, 64))
    assert scheme.low_rank == SCHEMES[branch] and result.branch is not None
    packed = pack_weight(result.weight, scheme, result.quantized, result.mask)
    packed |= pack_branch(scheme.low_rank, result.branch.v, result.branch.u, result.branch.quantized)
    specs = tensor_specs(scheme, (48, 64))
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {n: s.shape for n, s in specs.items()}
    torch.testing.assert_close(
        effective_weight(scheme, packed, (48, 64), torch.float32), effective(result), rtol=1e-5, atol=1e-5
    )
    module = CompressedLinear(scheme, 64, 48, bias=False, dtype=torch.float32)
    module.load_state_dict(packed)
    want = x @ effective(result).T
    for tokens in (1, 20):
        got = module(x[:tokens])
        assert float((got - want[:tokens]).norm() / want[:tokens].norm()) < 1e-5


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BRANCHES)
def made(
    request: pytest.FixtureRequest, llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recipe]:
    out, recipe = tmp_path_factory.mktemp("branch") / "out", recipe_for(text_file, BRANCHES[request.param])
    compress_checkpoint(llama, recipe, out, dtype="float32")
    return out, recipe


def test_errors_go_down_against_the_same_recipe_without(
    made: tuple[Path, Recipe], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    compress_checkpoint(llama, recipe_for(text_file, None), tmp_path / "alone", dtype="float32")
    errors = [
        {layer.name: layer.error or 0.0 for layer in inspect_checkpoint(folder).layers}
        for folder in (made[0], tmp_path / "alone")
    ]
    assert sum(errors[0].values()) < 0.8 * sum(errors[1].values())


def test_both_loaders_run_it_and_saving_again_keeps_every_bit(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    folder, _ = made
    model = halfweight.load(folder, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, plain(IDS).logits)
        assert {choice.backend for choice in warmup(model)} == {"cpu"}
        assert torch.equal(logits, model(IDS).logits)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name].to(tensor.dtype)), name
        assert tensor.is_floating_point() == after[name].is_floating_point()


def test_bits_of_the_branch_are_counted(made: tuple[Path, Recipe], llama: Path) -> None:
    folder, recipe = made
    found, tensors = inspect_checkpoint(folder, device="cpu"), tensors_of(folder)
    layers = {layer.name: layer for layer in found.layers}
    assert not [name for name in layers if name.endswith((".U", ".V"))]
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(Q + ".")}
    assert any(name.startswith(f"{Q}.V") for name in own)
    assert layers[Q].bits == 8 * sum(tensor.nbytes for tensor in own.values()) / prod(layers[Q].shape)
    assert 0.48 < layers[Q].density <= 0.5 and "rank 16" in layers[Q].numbers
    linears = 8 * sum(tensor.nbytes for name, tensor in tensors.items() if "_proj." in name)
    assert found.effective_bits == pytest.approx(linears / sum(prod(layer.shape) for layer in found.layers))
    planned = plan(llama, recipe)
    assert planned.effective_bits == pytest.approx(found.effective_bits)
    assert planned.effective_bits_model == pytest.approx(found.effective_bits_model)


def test_runs_resume_with_their_branches(
    made: tuple[Path, Recipe], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: Any) -> None:
        if step.stage == "blocks" and step.done == 1 and "error" in step.detail:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(llama, made[1], out, dtype="float32", progress=stop)
    assert compress_checkpoint(llama, made[1], out, dtype="float32").blocks_resumed == 1
    assert contents(out) == contents(made[0])


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 10**15}, "rank: Input should be less than"),
        ({"rank": 10**6}, "rank 1000000"),
        ({"rank": 8}, "shape"),
        ({"bogus": 1}, "bogus"),
        ({"integers": {"bits": 4, "group_size": 6}}, ""),
    ],
)
def test_hostile_branches_are_refused_in_one_line(
    change: dict[str, Any], words: str, made: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(made[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["linears"][Q]["low_rank"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    loaders: list[Callable[[Path], Any]] = [halfweight.load, AutoModelForCausalLM.from_pretrained]
    for loader in loaders:
        with pytest.raises(InputError) as caught:
            loader(folder)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_fused_linears_may_differ_in_rank_alone(text_file: Path) -> None:
    shapes = {"block.q_proj": (128, 128), "block.k_proj": (32, 128), "block.v_proj": (32, 128)}
    stages = recipe_for(text_file, BRANCHES["int4"]).resolve(shapes)
    branches = [stages[name].scheme(shape).low_rank for name, shape in shapes.items()]
    assert [branch.rank for branch in branches if branch is not None] == [64, 16, 16]
    parts = [
        {"pass": "gqsa", **STAGES["gqsa"], "targets": ["q_proj"], "low_rank": {}},
        {"pass": "gqsa", **STAGES["gqsa"], "targets": ["k_proj", "v_proj"]},
    ]
    with pytest.raises(InputError, match="must share one scheme"):
        Recipe.parse({"stages": parts}).resolve(shapes)


def test_weights_that_are_stored_whole_take_no_branch(text_file: Path, llama: Path) -> None:
    stage = {"pass": "magnitude", "pattern": "4:8", "low_rank": {}}
    with pytest.raises(InputError, match="4:8 is stored whole, where a low-rank branch would gain nothing"):
        plan(llama, Recipe.parse({"calibration": {"seqlen": 32}, "stages": [stage]}))
    with pytest.raises(ValueError, match="stored whole"):
        LinearScheme(pattern="4:8", density=0.5, low_rank=LowRankScheme(rank=16))


@pytest.mark.parametrize(("settings", "words"), [({"rank": 4}, "rank"), ({"fraction": 0}, "fraction"), (3, "low_rank")])
def test_bad_settings_are_one_line(settings: Any, words: str, text_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        recipe_for(text_file, settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("branch", [{"fraction": 0.5}, {"fraction": 0.5, "bits": 4, "group_size": 16}])
def test_a_16_bit_run_and_its_artifact_agree_exactly(
    branch: dict[str, Any], text_file: Path, llama: Path, tmp_path: Path
) -> None:
    """However many roundings the blocks add up: both multiply the same effective weights."""
    report = compress_checkpoint(llama, recipe_for(text_file, branch), tmp_path / "out", dtype="bfloat16")
    assert report.verification.relative_difference == 0.0
