"""Bytes divided over all blocks by what the model's predictions lose, against autograd over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halfweight import InputError, Recipe, RunError, compress_checkpoint, plan
from halfweight.compress import fisher
from halfweight.compress.blocks import BlockWalker, open_dense
from runs import break_gradients, goes_through_once

WINDOWS = list(torch.randint(3, 40, (6, 200), generator=torch.Generator().manual_seed(0)))


def recipe(text: Path, search: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    stage = {"pass": "keep", "selection": {"sparsity": 0.5, "allocation": "fisher", **settings}}
    calibration = {"data": str(text), "samples": 8, "seqlen": 32}
    return Recipe.parse({"calibration": calibration, "stages": [stage], "search": search})


def silent(text: str) -> None:
    pass


def by_autograd(folder: Path, windows: list[Tensor], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every linear of the blocks: inputs `[B, T, K]`, and gradients `[B, T, N]` of drawn labels' cross entropy."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), y

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_hook(keep(name))
    logits = model(torch.stack(windows)).logits
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.multinomial(row.detach().softmax(-1), 1, generator=generator)[:, 0] for row in logits]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {name: (inputs[name], g) for name, g in zip(outputs, gradients, strict=True)}


def test_curves_are_those_of_the_whole_model(llama: Path, text_file: Path) -> None:
    walker = BlockWalker(open_dense(llama), torch.device("cpu"), torch.float32)
    stages = recipe(text_file, score="l2").resolve(walker.linear_shapes())
    curves = fisher.prediction_curves(walker, stages, WINDOWS, 7, silent)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, (x, g) in by_autograd(llama, WINDOWS, 7).items():
        weight = model.get_submodule(name).weight.detach()
        size = x.abs() * weight.norm(dim=0)
        assert {0.1, 0.2, 0.3, 0.4, 0.5, 0.6} <= set(curves[name])  # and on, up to what norms leave
        for level in (0.1, 0.3, 0.5):
            # 32 bits of norm per input of 16 N bits, and 32 of the threshold, are read beside the inputs.
            n, k = weight.shape
            share = (1 - level) - (32 * k + 32) / (16 * n * k)
            total = 0.0
            for parts in zip(x.split(5), g.split(5), size.split(5), strict=True):  # batches of up to 1024 tokens
                some, slope, score = (part[:, 2:] for part in parts)  # the first 1 % are not counted
                unread = score <= score.flatten().quantile(1 - share)
                terms = (slope * -(some * unread @ weight.T)).sum(-1).square().flatten()
                total += float(terms.log1p().sum())
            # The first linears see the same few embeddings over and over, with many equal scores at the threshold.
            near = 0.1 if "layers.0.self_attn" in name else 0.01
            assert curves[name][level] == pytest.approx(total, rel=near), (name, level)


def test_the_budget_is_kept_and_goes_where_predictions_suffer(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file)
    report = compress_checkpoint(llama, settings, tmp_path / "whole")
    bits = [16 * layer.shape[0] * layer.shape[1] for layer in report.layers]
    unread = [layer.stats["sparsity"] * b for layer, b in zip(report.layers, bits, strict=True)]
    assert sum(unread) == pytest.approx(0.5 * sum(bits))
    by_block = [sum(unread[i : i + 7]) / sum(bits[i : i + 7]) for i in range(0, len(bits), 7)]
    assert max(by_block) - min(by_block) > 0.01  # blocks share, too
    goes_through_once("allocate", llama, settings, tmp_path / "out", tmp_path / "whole")


def test_a_search_begins_where_it_ends(llama: Path, text_file: Path, tmp_path: Path) -> None:
    alone = compress_checkpoint(llama, recipe(text_file), tmp_path / "alone")
    search = {"method": "random", "trials": 2, "samples": 2, "seqlen": 32, "groups": 2}
    report = compress_checkpoint(llama, recipe(text_file, search), tmp_path / "searched")
    sizes = [layer.shape[0] * layer.shape[1] for layer in alone.layers[:7]]
    mean = sum(s * layer.stats["sparsity"] for s, layer in zip(sizes, alone.layers[:7], strict=True)) / sum(sizes)
    assert report.search[0].sparsity[0] == pytest.approx(mean, abs=1e-6)


def test_gradients_that_are_not_finite_name_the_linear(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch)
    with pytest.raises(RunError, match=r"model.layers.\d.mlp.down_proj: the gradients through it are not finite"):
        compress_checkpoint(llama, recipe(text_file), tmp_path / "out")


def test_the_plan_has_it(llama: Path, text_file: Path) -> None:
    stages = {stage.name: stage for stage in plan(llama, recipe(text_file)).stages}
    assert stages["allocation"].tokens == 8 * 32 and stages["allocation"].seconds > 0


def pruning(text: Path, **settings: Any) -> Recipe:
    stage = {"pass": "gqsa", "pattern": "1x8", "density": 0.5, "allocation": "fisher", "mask": "wanda", **settings}
    return Recipe.parse({"calibration": {"data": str(text), "samples": 8, "seqlen": 32}, "stages": [stage]})


def test_pruning_is_priced_by_least_squares_on_what_is_kept(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "REFITS", 50)  # a few are enough to compare prices
    walker = BlockWalker(open_dense(llama), torch.device("cpu"), torch.float32)
    stages = pruning(text_file).resolve(walker.linear_shapes())
    curves = fisher.prediction_curves(walker, stages, WINDOWS, 7, silent)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, (x, g) in by_autograd(llama, WINDOWS, 7).items():
        weight = model.get_submodule(name).weight.detach().double()
        x, g = (part[:, 2:].flatten(0, 1).double() for part in (x, g))  # the first 1 % are not counted
        hessian = x.T @ x / len(x)
        damped = hessian + 0.03 * hessian.diagonal().mean() * torch.eye(len(hessian))
        groups = (weight.square() * hessian.diagonal()).unflatten(1, (-1, 8)).sum(-1)
        assert curves[name][0.0] == 0
        for level in (0.3, 0.5, 0.8):
            kept = round((1 - level) * groups.shape[1])
            fitted = torch.zeros_like(weight)
            for row, target, score in zip(fitted, weight, groups, strict=True):
                read = (score >= score.sort(descending=True).values[kept - 1]).repeat_interleave(8)
                row[read] = torch.linalg.solve(damped[read][:, read], damped[read] @ target)
            total = float((x @ (fitted - weight).T * g).sum(-1).square().log1p().sum())
            assert curves[name][level] == pytest.approx(total, rel=0.01), (name, level)


def test_densities_keep_the_budget_and_what_servers_need(llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = compress_checkpoint(llama, pruning(text_file), tmp_path / "out")
    density = {layer.name: layer.density for layer in report.layers}
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    assert sum(sizes[n] * d for n, d in density.items()) == pytest.approx(0.5 * sum(sizes.values()), rel=0.05)
    assert len(set(density.values())) > 1
    for name, value in density.items():
        parent, _, tail = name.rpartition(".")
        for first in ("q_proj",) if tail in ("k_proj", "v_proj") else ("gate_proj",) if tail == "up_proj" else ():
            assert value == density[f"{parent}.{first}"]
    same = compress_checkpoint(llama, pruning(text_file, allocation="uniform"), tmp_path / "same")
    assert {layer.density for layer in same.layers} == {0.5}


@pytest.mark.parametrize("changes", [{"pattern": "2:4", "density": None, "group_size": 8}, {"balance": "layer"}])
def test_densities_of_their_own_need_rows_of_groups(text_file: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="allocation: fisher gives rows of groups other densities"):
        pruning(text_file, **changes)
