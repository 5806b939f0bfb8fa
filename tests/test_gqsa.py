"""Pruning and quantizing in one sweep: masks against brute force, exact counts, and what the joint sweep gains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress.passes import PASSES, GQSAConfig, PruneResult
from halfweight.compress.passes.gqsa.masks import GroupSurgeon, group_mask
from halfweight.compress.passes.hessian import inverse_upper_factor
from halfweight.compress.passes.quantization import CodeRange, quantize
from halfweight.compress.passes.sweep import group_order
from halfweight.compress.report import CompressionReport, Progress
from halfweight.serving.checkpoint import Checkpoint
from halfweight.serving.storage import dense_weight, pack_weight
from problems import output_error, problem, statistics_of

ROWS, SIZE = 6, 64
MASKS = ["admm", "obs", "diagonal", "wanda"]
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4", "group_size": 16},
    "4:8": {"pattern": "4:8", "group_size": 16},
    "1x8": {"pattern": "1x8", "density": 0.5},
    "1x16": {"pattern": "1x16", "density": 0.75},
    "sparse": {"pattern": "1x8", "density": 0.25},
    "segments": {"pattern": "1x8", "density": 0.5, "segments": 4},
    "layer": {"pattern": "1x8", "density": 0.3, "balance": "layer"},
    "symmetric": {"pattern": "1x16", "density": 0.5, "symmetric": True},
}


def configure(shape: tuple[int, int] = (ROWS, SIZE), name: str = "q_proj", **settings: Any) -> GQSAConfig:
    return GQSAConfig(**settings).for_linear(name, shape)


def solve(weight: Tensor, x: Tensor, **settings: Any) -> PruneResult:
    config = configure((weight.shape[0], weight.shape[1]), **settings)
    return PASSES["gqsa"].solve(weight, statistics_of(x), config)


# --- what comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [SIZE, 61])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_exact_zeros_are_zero_and_the_result_is_what_is_stored(
    pattern: str, mask: str, columns: int
) -> None:
    settings = PATTERNS[pattern]
    if columns % 8 and (pattern == "segments" or ":" in settings["pattern"]):
        pytest.skip("needs whole groups")
    weight, x = problem(0, size=columns)
    shape = (ROWS, columns)
    config = configure(shape, mask=mask, **settings)
    before, statistics = weight.clone(), statistics_of(x)
    result, again = (PASSES["gqsa"].solve(weight, statistics, config) for _ in range(2))
    assert torch.equal(weight, before)
    assert torch.equal(result.weight, again.weight)
    assert (result.weight[~result.mask] == 0).all()
    assert torch.isfinite(result.weight).all()
    if config.nm is not None:
        n, m = config.nm
        assert (result.mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    else:
        group = config.group
        assert group is not None
        whole = torch.nn.functional.pad(result.mask, (0, -columns % group)).unflatten(1, (-1, group))
        alive = whole.any(-1)
        total = -(-columns // group)
        if config.balance == "layer":
            assert int(alive.sum()) == round(config.kept * total * ROWS)
        else:
            assert (alive.sum(1) == round(config.kept * total)).all()
            segments = alive.unflatten(1, (int(config.segments), -1)).sum(-1)
            assert (segments == segments[:, :1]).all()
        full = whole[:, : columns // group]
        assert (full.all(-1) == full.any(-1)).all()
    scheme = config.scheme(shape)
    packed = pack_weight(result.weight, scheme, result.quantized, result.mask)
    assert torch.equal(dense_weight(scheme, packed, shape, torch.float32), result.weight)


@pytest.mark.parametrize("mask", ["admm", "obs"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [64, 52])
def test_groups_of_outputs_are_kept_whole_and_alike_for_every_input(rows: int, symmetric: bool, mask: str) -> None:
    weight, x = problem(1, size=40, rows=rows)
    shape = (rows, 40)
    config = configure(shape, pattern="8x1", density=0.5, mask=mask, symmetric=symmetric)
    result = PASSES["gqsa"].solve(weight, statistics_of(x), config)
    whole = torch.nn.functional.pad(result.mask.T, (0, -rows % 8)).unflatten(1, (-1, 8))
    assert (whole.any(-1).sum(1) == round(0.5 * -(-rows // 8))).all()
    assert (whole[:, : rows // 8].all(-1) == whole[:, : rows // 8].any(-1)).all()
    assert (result.weight[~result.mask] == 0).all()
    scheme = config.scheme(shape)
    packed = pack_weight(result.weight, scheme, result.quantized, result.mask)
    assert torch.equal(dense_weight(scheme, packed, shape, torch.float32), result.weight)


def test_a_column_keeps_its_largest_groups_of_outputs() -> None:
    """Against brute force, column by column, as the sweep sees the first of them."""
    weight, x = problem(2, size=24, rows=32)
    result = solve(weight, x, pattern="8x1", density=0.5, mask="obs", activation_order=False)
    norms = weight[:, 0].unflatten(0, (4, 8)).square().sum(1)
    kept = result.mask[:, 0].unflatten(0, (4, 8)).any(1)
    assert sorted(norms.topk(2).indices.tolist()) == kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("mask", MASKS)
def test_rows_are_solved_alone(mask: str) -> None:
    weight, x = problem(3, size=SIZE)
    settings: dict[str, Any] = {"pattern": "1x8", "density": 0.5, "mask": mask, "ramp": 1}
    whole = solve(weight, x, **settings)
    halves = [solve(part, x, **settings) for part in weight.split(ROWS // 2)]
    assert torch.equal(whole.mask, torch.cat([half.mask for half in halves]))
    torch.testing.assert_close(whole.weight, torch.cat([half.weight for half in halves]))


# --- masks -----------------------------------------------------------------------------------------------------


def test_group_masks_keep_the_best_of_each_segment() -> None:
    score = torch.randint(4, (5, 12), generator=torch.Generator().manual_seed(0)).float()
    segment = torch.arange(12) // 4
    kept = torch.tensor([[1, 2, 3]]).expand(5, 3)
    mask = group_mask(score, kept, segment)
    for row in range(5):
        for number in range(3):
            members = range(4 * number, 4 * number + 4)
            best = sorted(members, key=lambda j: (-float(score[row, j]), j))[: number + 1]
            assert [j for j in members if mask[row, j]] == sorted(best)
    assert int(group_mask(score, torch.tensor(17), None).sum()) == 17


def test_group_saliency_is_the_exact_cost_of_removing_the_group() -> None:
    """Against least squares: the loss left when a group is fixed at zero and every other weight is free."""
    weight, x = problem(5, size=20)
    hessian = statistics_of(x).hessian.double()
    hessian.diagonal().add_(1e-3 * hessian.diagonal().mean())
    upper, _ = inverse_upper_factor(hessian.clone(), 1e-12)
    _, spans = group_order(hessian.diagonal(), 8, False, False)  # 8, 8 and 4 columns
    surgeon = GroupSurgeon(upper, spans)
    w = weight.double()
    for start in (0, 8, 16):
        scores = surgeon(w.T[start:], start)
        free = hessian[start:, start:]
        for span, score in zip([span for span in spans if span.start >= start], scores, strict=True):
            gone = torch.arange(span.start - start, span.stop - start)
            rest = torch.tensor([j for j in range(20 - start) if j not in gone.tolist()], dtype=torch.long)
            values = w[:, start:][:, gone]
            schur = free[gone][:, gone]
            if len(rest):
                schur = schur - free[gone][:, rest] @ torch.linalg.solve(free[rest][:, rest], free[rest][:, gone])
            torch.testing.assert_close(score, ((values @ schur) * values).sum(1), rtol=1e-5, atol=1e-8)


def test_group_saliency_finds_the_best_single_group() -> None:
    """One group goes: the first choice of the sweep must be the mask that brute force finds."""
    weight, x = problem(7, size=32, rows=12)
    hessian = statistics_of(x).hessian.double()
    result = solve(weight, x, pattern="1x8", density=0.75, mask="obs", damping=1e-6, activation_order=False)
    # Which group is gone is decided when the sweep starts, before anything is quantized: block_size covers all columns.
    for row in range(12):
        costs = []
        for keep in combinations(range(4), 3):
            kept = torch.tensor([c for g in keep for c in range(8 * g, 8 * g + 8)])
            best = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row].double())
            delta = -weight[row].double().clone()
            delta[kept] += best
            costs.append((float(delta @ hessian @ delta), keep))
        keep = min(costs)[1]
        alive = result.mask[row].view(4, 8).any(1).nonzero()[:, 0].tolist()
        assert tuple(alive) == keep


# --- what the joint sweep gains --------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1x8"])
def test_one_joint_sweep_beats_pruning_then_rounding(pattern: str) -> None:
    errors: dict[str, list[float]] = {"joint": [], "admm": [], "apart": []}
    for seed in range(5):
        weight, x = problem(seed, tokens=512, size=64, rows=32)
        settings = (
            {"pattern": "2:4", "group_size": 8, "block_size": 8}
            if pattern == "2:4"
            else {"pattern": "1x8", "density": 0.75}
        )
        power = output_error(x, weight, torch.zeros_like(weight))
        joint = solve(weight, x, mask="obs", damping=0.01, **settings)
        strong = solve(weight, x, damping=0.01, **settings)
        if pattern == "2:4":
            apart = PASSES["sparsegpt"].solve(weight, statistics_of(x), PASSES["sparsegpt"].config(refine=0)).weight
        else:
            apart = weight * joint.mask
        _, rounded = quantize(apart, statistics_of(x).mean_square, CodeRange.of(4, False), 8, 20)
        for name, value in (("joint", joint.weight), ("admm", strong.weight), ("apart", rounded)):
            errors[name].append(output_error(x, weight, value) / power)
    joint_error, admm_error, apart_error = (float(np.mean(errors[name])) for name in ("joint", "admm", "apart"))
    assert joint_error < apart_error
    assert admm_error < apart_error


def test_reported_errors_are_those_of_the_calibration_inputs() -> None:
    weight, x = problem(2, size=SIZE)
    result = solve(weight, x, pattern="1x8", density=0.5)
    relative = output_error(x, weight, result.weight) / output_error(x, weight, torch.zeros_like(weight))
    assert result.stats["error"] == pytest.approx(relative, rel=1e-3)
    assert result.stats["error_pruned"] < result.stats["error"]


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pattern": "1x16"}, "needs a density"),
        ({"pattern": "2:4", "density": 0.5}, "fixes density"),
        ({"pattern": "1x16", "density": 0.5, "group_size": 32}, "fixes group_size"),
        ({"pattern": "1x16", "density": 0.5, "bits": 8}, "4 bits"),
        ({"pattern": "1x12", "density": 0.5}, "groups have 8, 16, 32, 64 inputs"),
        ({"pattern": "unstructured", "density": 0.5}, "unknown pattern"),
        ({"pattern": "2:4", "balance": "layer"}, "no balance"),
        ({"pattern": "1x8", "density": 0.5, "balance": "layer", "segments": 2}, "no segments"),
        ({"pattern": "1x8", "density": 0.5, "scope": "layer"}, "use balance"),
        ({"pattern": "4:8", "group_size": 12}, "not a multiple"),
        ({"pattern": "1x64", "density": 0.5, "block_size": 32}, "block_size"),
        ({"pattern": "16x1", "density": 0.5, "along": "inputs"}, "fixes along"),
        ({"pattern": "1x16", "density": 0.5, "along": "outputs"}, "fixes along"),
        ({"pattern": "2:4", "along": "outputs"}, "fixes along"),
        ({"pattern": "16x1", "density": 0.5, "balance": "layer"}, "neither balance"),
        ({"pattern": "16x1", "density": 0.5, "segments": 2}, "nor segments"),
        ({"pattern": "12x1", "density": 0.5}, "groups have 8, 16, 32, 64 outputs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GQSAConfig(**settings)


def test_row_parallel_linears_get_the_most_segments_that_fit() -> None:
    for name, columns, expected in [
        ("a.down_proj", 1536, 8),
        ("a.o_proj", 576, 2),
        ("a.o_proj", 4096, 8),
        ("a.q_proj", 4096, 1),
        ("a.down_proj", 100, 1),
    ]:
        config = configure((8, columns), name, pattern="1x16", density=0.5)
        assert config.segments == expected
        assert config.scheme((8, columns)).segments == expected
    with pytest.raises(ValueError, match="4 segments do not split"):
        configure((8, 576), "o_proj", pattern="1x16", density=0.5, segments=4)
    with pytest.raises(ValueError, match="keeps none of its 4 groups"):
        configure((8, 64), pattern="1x16", density=0.1)


# --- the whole way ---------------------------------------------------------------------------------------------


def recipe(text_file: Path, *stages: dict[str, Any]) -> Recipe:
    calibration = {"data": str(text_file), "samples": 8, "seqlen": 32}
    return Recipe.parse({"name": "test", "calibration": calibration, "stages": list(stages)})


STAGES: dict[str, dict[str, Any]] = {
    "rtn": {"pass": "rtn", "group_size": 32},
    "int8": {"pass": "rtn", "bits": 8, "group_size": 32, "symmetric": True},
    "gptq": {"pass": "gptq", "group_size": 16},
    "w2": {"pass": "gptq", "bits": 2, "group_size": 16},
    "2:4": {"pass": "gqsa", "pattern": "2:4", "group_size": 16},
    "groups": {"pass": "gqsa", "pattern": "1x8", "density": 0.5},
    "by layer": {"pass": "gqsa", "pattern": "1x8", "density": 0.4, "balance": "layer", "mask": "obs"},
    "along outputs": {"pass": "gptq", "group_size": 16, "along": "outputs"},
    "int8 along outputs": {"pass": "rtn", "bits": 8, "group_size": 32, "along": "outputs"},
    "groups of outputs": {"pass": "gqsa", "pattern": "8x1", "density": 0.5},
}


@pytest.mark.parametrize("kind", STAGES)
def test_compressed_models_load_verify_and_weigh_what_the_plan_said(
    kind: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    dense = make_model("llama", intermediate_size=72)
    given = recipe(text_file, STAGES[kind])
    lines: list[str] = []
    report = compress_checkpoint(dense, given, tmp_path / "out", progress=lambda step: lines.append(step.detail))
    assert report.verification.relative_difference <= report.verification.tolerance
    plan = halfweight.plan(dense, given)
    inspection = halfweight.inspect_checkpoint(tmp_path / "out")
    assert report.effective_bits == inspection.effective_bits == pytest.approx(plan.effective_bits, rel=1e-12)
    assert report.effective_bits_model == pytest.approx(plan.effective_bits_model, rel=1e-12)
    layer = report.layers[0]
    assert layer.numbers == inspection.layers[0].numbers
    assert layer.numbers.startswith("int8" if "int8" in kind else "int4")
    if kind in ("2:4", "groups"):
        assert 0 < layer.stats["error_pruned"] < layer.stats["error"]
        assert any("pruned" in line and layer.numbers in line for line in lines)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = halfweight.load(tmp_path / "out", dtype="float32")(tokens).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["2:4", "groups", "by layer"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    kind: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(step: Progress) -> None:
        if step.stage == "blocks" and step.done == 1 and "error" in step.detail:
            raise Stop

    dense, given = make_model("llama"), recipe(text_file, STAGES[kind])
    compress_checkpoint(dense, given, tmp_path / "whole")
    with pytest.raises(Stop):
        compress_checkpoint(dense, given, tmp_path / "out", progress=stop)
    assert compress_checkpoint(dense, given, tmp_path / "out").blocks_resumed == 1
    for name in ("config.json", "halfweight-00001-of-00001.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    reports = [
        CompressionReport.model_validate_json((tmp_path / d / "report.json").read_text()) for d in ("out", "whole")
    ]
    assert reports[0].layers == reports[1].layers


def test_a_density_that_keeps_nothing_names_the_linear(llama: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe(text_file, {"pass": "gqsa", "pattern": "1x16", "density": 0.1})
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj: density 0\.1 keeps none"):
        compress_checkpoint(llama, given, tmp_path / "out")


def test_damaged_weights_name_the_linear(make_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = make_model("llama", num_hidden_layers=3)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    for stage in STAGES.values():
        with pytest.raises(RunError, match=r"model\.layers\.1\.\S+: its (weights|inputs) are") as caught:
            compress_checkpoint(dense, recipe(text_file, stage), tmp_path / "out", fresh=True)
        assert "\n" not in str(caught.value)


def test_fused_linears_share_a_scheme(llama: Path, text_file: Path, tmp_path: Path) -> None:
    stage = {"pass": "gqsa", "pattern": "1x8", "density": 0.4, "balance": "layer"}
    compress_checkpoint(llama, recipe(text_file, stage), tmp_path / "out")
    artifact = Checkpoint(tmp_path / "out").artifact
    assert artifact is not None
    other = {"pass": "gqsa", "pattern": "1x8", "density": 0.5, "targets": ["k_proj"]}
    mixed = recipe(text_file, {**stage, "ignore": ["k_proj"]}, other)
    with pytest.raises(InputError, match="must share one scheme"):
        compress_checkpoint(llama, mixed, tmp_path / "mixed")
