"""Changes of basis: the same model, groups of alike neighbours, and nothing of it left in the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint, plan
from halfweight.compress import basis
from halfweight.compress.blocks import BlockWalker, open_dense
from halfweight.compress.report import Progress
from runs import contents, interrupt, stop_in_block

STAGE = {"pass": "gqsa", "pattern": "1x8", "density": 0.5, "mask": "wanda"}


def recipe(text: Path, stage: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    calibration = {"data": str(text), "samples": 8, "seqlen": 32}
    settings = {"group_size": 8, **settings}
    return Recipe.parse({"calibration": calibration, "basis": settings, "stages": [stage or STAGE]})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_the_model_stays_what_it_is(
    family: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = make_model(family)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Eight bits in groups of two change next to nothing, so that what is left is the order.
    stage = {"pass": "rtn", "bits": 8, "group_size": 2}
    compress_checkpoint(folder, recipe(text_file, stage), tmp_path / "out", dtype="float32")
    made = halfweight.load(tmp_path / "out", dtype="float32")
    ids = torch.randint(3, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = made(ids).logits, dense(ids).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    moved = made.get_input_embeddings().weight
    assert not torch.equal(moved, dense.get_input_embeddings().weight)
    assert torch.equal(moved.sort(1).values, dense.get_input_embeddings().weight.sort(1).values)
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith("basis")]


def test_channels_are_in_another_order_and_steps_are_told(llama: Path, text_file: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    compress_checkpoint(llama, recipe(text_file), tmp_path / "out", progress=steps.append)
    asked = [step for step in steps if step.stage == "basis"]
    assert [step.done for step in asked] == list(range(1, asked[0].total + 1))
    dense = AutoModelForCausalLM.from_pretrained(llama)
    moved = halfweight.load(tmp_path / "out")
    rows = {tuple(row.tolist()): number for number, row in enumerate(dense.get_input_embeddings().weight.T)}
    order = [rows[tuple(row.tolist())] for row in moved.get_input_embeddings().weight.T]
    assert sorted(order) == list(range(32))
    assert order != list(range(32))


def test_orders_are_by_what_outputs_lose(llama: Path, text_file: Path) -> None:
    walker = BlockWalker(open_dense(llama), torch.device("cpu"), torch.float32)
    settings = recipe(text_file)
    assert settings.basis is not None
    stages = settings.resolve(walker.linear_shapes())
    windows = list(torch.randint(3, 40, (4, 32), generator=torch.Generator().manual_seed(0)))
    axes = basis.tensor_axes(walker)
    changes, loss = basis.find_changes(walker, settings.basis, stages, axes, windows, lambda text: None)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        logits = model(torch.stack(windows)).logits
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits[0, :-1], windows[0][1:])), rel=1e-4)
    scores = {n: model.get_submodule(n).weight.square().sum(0) * x.square().mean(0) for n, x in inputs.items()}
    shares = [
        (s / s.mean()).log() for n, s in scores.items() if n.endswith(("q_proj", "k_proj", "v_proj", "gate_proj"))
    ]
    shares += [(s / s.mean()).log() for n, s in scores.items() if n.endswith("up_proj")]
    assert changes["residual"].tolist() == sum(shares).argsort(descending=True).tolist()
    down = scores["model.layers.1.mlp.down_proj"].argsort(descending=True)
    assert changes["model.layers.1.ffn"].tolist() == basis.deal(down, 8).tolist()
    for head, rotation in enumerate(changes["model.layers.0.values"]):
        values = inputs["model.layers.0.self_attn.o_proj"].view(-1, 2, 2, 8)[:, head].reshape(-1, 8)
        power = (values @ rotation).square().mean(0)
        wanted = torch.linalg.svdvals(values).square() / len(values)
        assert torch.allclose(power, wanted, rtol=1e-3, atol=1e-6 * float(wanted[0]))
        assert torch.allclose(rotation.T @ rotation, torch.eye(8), atol=1e-5)


def test_pieces_get_groups_of_all_sizes() -> None:
    order = torch.arange(1536)
    dealt = basis.deal(order, 16)
    assert sorted(dealt.tolist()) == order.tolist()
    groups = dealt.view(96, 16)
    assert torch.equal(groups - groups[:, :1], torch.arange(16).expand(96, 16))  # sorted neighbours stay together
    sums = dealt.view(8, -1).sum(1)
    assert int(sums.max() - sums.min()) <= 16 * 16  # a group's place
    assert torch.equal(basis.deal(order[:1000], 16), order[:1000])  # nothing to deal


@pytest.mark.parametrize(
    ("family", "tensor"), [("phi3", "qkv_proj"), ("opt", "embed_positions"), ("gpt_neox", "layers.0")]
)
def test_channels_that_are_not_known_stay(
    family: str, tensor: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"basis: what \S*{tensor}\S* does to the channels is not known; remove"):
        compress_checkpoint(make_model(family), recipe(text_file), tmp_path / "out")


def test_channels_that_do_not_belong_together_are_noticed(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = basis.find_changes

    def wrong(*args: Any) -> Any:
        changes, loss = right(*args)
        return {name: 3 * change if name.endswith("0.values") else change for name, change in changes.items()}, loss

    monkeypatch.setattr(basis, "find_changes", wrong)
    with pytest.raises(RunError, match=r"computes something else in another basis \(loss \d"):
        compress_checkpoint(llama, recipe(text_file), tmp_path / "out")


def test_an_interrupted_run_ends_alike(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, STAGE | {"allocation": "fisher"})
    compress_checkpoint(llama, settings, tmp_path / "whole")
    interrupt(llama, settings, tmp_path / "out", stop_in_block(1))
    again: list[Progress] = []
    compress_checkpoint(llama, settings, tmp_path / "out", progress=again.append)
    assert not any(step.stage == "basis" for step in again)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_plan_has_it(llama: Path, text_file: Path) -> None:
    planned = plan(llama, recipe(text_file)).stages
    assert [stage.name for stage in planned] == ["basis", "compress"]
    assert planned[0].disk_gb == pytest.approx((llama / "model.safetensors").stat().st_size / 1e9, rel=0.05)
    assert planned[0].tokens == 8 * 32
    values = plan(llama, recipe(text_file, axes=["values"])).stages[0]
    assert values.disk_gb == 2 * 2 * (16 * 32 + 32 * 32) / 1e9  # bf16, of two blocks: nothing else changes
