"""Mixtures of experts: calibrated with their own tokens, stored as ordinary linears, loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import halfweight
from artifacts import IDS, LOADERS, stored
from halfweight import InputError, compress_checkpoint, verify_checkpoint
from halfweight.compress.blocks import BlockWalker
from halfweight.serving.checkpoint import Checkpoint
from halfweight.serving.experts import Experts, unfuse
from halfweight.serving.linear import CompressedLinear
from halfweight.triton_kernels.formats import two_four
from runs import change_tensor, contents, fails, interrupt, parsed, stop_in_block
from tiny import MIXTURES

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
pytestmark = pytest.mark.skipif(OLD, reason="experts need transformers 5.23")
TOKENS = 4 * 32  # of the calibration
Make = Callable[..., Path]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits.float()
    return out


def fused_copy(dense: Path, compressed: Any) -> Any:
    """transformers' own model, experts fused, with the weights that the compressed one stands for."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for name, module in compressed.named_modules():
        if not isinstance(module, CompressedLinear):
            continue
        weight = module.dense_weight()
        parts = name.split(".")
        if "experts" not in parts:
            model.get_submodule(name).weight.data.copy_(weight)
            continue
        stack, number = model.get_submodule(".".join(parts[:-2])), int(parts[-2])
        if parts[-1] == "down_proj":
            stack.down_proj.data[number] = weight
        else:
            half = len(weight) * (parts[-1] == "up_proj")
            stack.gate_up_proj.data[number, half : half + len(weight)] = weight
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_as_linears_compute_what_fused_ones_do(family: str, make_model: Make) -> None:
    folder = make_model(family, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    walker = BlockWalker(Checkpoint(folder), torch.device("cpu"), torch.float32)
    assert len(walker.linear_shapes()) == 2 * (4 + 4 * 3)
    stream = walker.embed([IDS[0]])
    for index in range(walker.n_blocks):
        with walker.block(index) as block:
            for x in stream:
                x.copy_(walker.run(index, block, x))
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:], reduction="none")
    assert torch.allclose(walker.losses(stream, [IDS[0]])[0], wanted, atol=1e-5)


STAGES: dict[str, dict[str, Any]] = {
    "wanda": {"pass": "wanda"},
    "sparsegpt": {"pass": "sparsegpt"},
    "admm": {"pass": "admm"},
    "magnitude": {"pass": "magnitude"},
    "rtn": {"pass": "rtn", "group_size": 16},
    "gptq": {"pass": "gptq", "group_size": 16},
    "gqsa": {"pass": "gqsa", "pattern": "1x16", "density": 0.5, "group_size": 16},
    "low rank": {"pass": "gptq", "group_size": 16, "low_rank": {"fraction": 0.5}},
}
CASES = [("qwen3_moe", method) for method in STAGES] + [("mixtral", "gqsa"), ("olmoe", "wanda")]


@pytest.mark.parametrize("family, method", CASES)
def test_every_pass_works_on_experts_and_loads_in_transformers(
    family: str, method: str, make_model: Make, text_file: Path, tmp_path: Path
) -> None:
    dense, out = make_model(family), tmp_path / "out"
    report = compress_checkpoint(dense, parsed(text_file, STAGES[method]), out, dtype="float32")
    assert len(report.layers) == 2 * (4 + 4 * 3)
    for block in range(2):
        gates = [n for n in report.layers if f"layers.{block}." in n.name and n.name.endswith("gate_proj")]
        assert sum(layer.stats["tokens"] for layer in gates) == 2 * TOKENS  # every token goes to two experts
        assert len({layer.stats["tokens"] for layer in gates}) > 1
    assert verify_checkpoint(out).problems == []
    assert "model.layers.1.mlp.experts.3.down_proj" in {name.rpartition(".")[0] for name in stored(out)}
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert sum(isinstance(module, Experts) for module in loaded.modules()) == 2
    if method != "low rank":
        wanted = logits(fused_copy(dense, loaded))
        assert float((logits(loaded) - wanted).norm() / wanted.norm()) < 1e-5
    assert torch.equal(logits(halfweight.load(out, dtype="float32")), logits(loaded))


def test_an_expert_without_tokens_is_done_by_magnitude_and_reported(
    make_model: Make, text_file: Path, tmp_path: Path
) -> None:
    # With rows a, -a, b, -b and 0 the router's two best are always |a x| and |b x|: the fifth is never among them.
    dense = make_model("qwen3_moe", num_experts=5)

    def never_the_fifth(weight: Tensor) -> None:
        weight[1], weight[3], weight[4] = -weight[0], -weight[2], 0

    for block in range(2):
        change_tensor(dense, f"model.layers.{block}.mlp.gate.weight", never_the_fifth)
    before = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    report = compress_checkpoint(dense, parsed(text_file, {"pass": "wanda"}), tmp_path / "out")
    fifth = [layer for layer in report.layers if ".experts.4." in layer.name]
    assert [(layer.stats["tokens"], layer.stats["by_magnitude"]) for layer in fifth] == [(0, 1.0)] * 6
    assert all(0 < layer.error < 0.5 for layer in fifth)
    tensors = stored(tmp_path / "out")
    name = "model.layers.0.mlp.experts.4.down_proj"
    weight = two_four.unpack(tensors[f"{name}.values"], tensors[f"{name}.meta"])
    own = before.model.layers[0].mlp.experts.down_proj[4].detach()
    largest = torch.zeros_like(own, dtype=torch.bool).unflatten(1, (-1, 4))
    largest.scatter_(2, own.abs().float().unflatten(1, (-1, 4)).topk(2).indices, True)
    assert torch.equal(weight, own * largest.flatten(1))
    for method in ("sparsegpt", "gqsa"):
        report = compress_checkpoint(dense, parsed(text_file, STAGES[method]), tmp_path / method)
        assert all(0 < layer.error < 1 for layer in report.layers if ".experts.4." in layer.name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_a_recipe_leaves_out_stay_dense_and_load(
    family: str, make_model: Make, text_file: Path, tmp_path: Path
) -> None:
    dense, out = make_model(family), tmp_path / "out"
    report = compress_checkpoint(dense, parsed(text_file, {"pass": "wanda", "targets": ["*.self_attn.*"]}), out)
    assert len(report.layers) == 8
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert not any(isinstance(module, Experts) for module in loaded.modules())
    wanted = logits(fused_copy(dense, loaded))
    assert float((logits(loaded) - wanted).norm() / wanted.norm()) < 1e-5
    # One tensor less, and transformers would fill a whole layer with random numbers: both loaders refuse.
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    del tensors[next(name for name in tensors if ".experts.3." in name)]
    save_file(tensors, shard, {"format": "pt"})
    for loader in LOADERS.values():
        with pytest.raises(InputError, match="experts"):
            loader(out)


def test_a_run_over_experts_resumes(make_model: Make, text_file: Path, tmp_path: Path) -> None:
    dense, recipe = make_model("olmoe"), parsed(text_file, STAGES["gptq"])
    compress_checkpoint(dense, recipe, tmp_path / "whole")
    interrupt(dense, recipe, tmp_path / "out", stop_in_block(1))
    assert compress_checkpoint(dense, recipe, tmp_path / "out").blocks_resumed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "some of a stack": ({"pass": "wanda", "ignore": ["*.experts.2.*"]}, "ignore all or none"),
    "no packed form": ({"pass": "wanda", "pattern": "4:8"}, "no packed form"),
    "selection": ({"pass": "keep", "selection": {"sparsity": 0.5}}, "cannot select its inputs yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_have_is_refused(case: str, make_model: Make, text_file: Path, tmp_path: Path) -> None:
    stage, words = REFUSED[case]
    message = fails(InputError, make_model("olmoe"), parsed(text_file, stage), tmp_path / "out")
    assert words in message and "experts" in message


def test_experts_of_another_make_are_refused() -> None:
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="fused experts of model type 'gpt_oss' are not supported"):
        unfuse(model)


def test_an_old_transformers_is_refused(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("olmoe")
    monkeypatch.setattr("halfweight.serving.experts.version", lambda name: "5.0.0")
    with pytest.raises(InputError, match=r"experts need transformers 5\.23 or newer; this is 5\.0\.0"):
        BlockWalker(Checkpoint(model), torch.device("cpu"), torch.float32)
