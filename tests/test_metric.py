"""What errors of a block cost the predictions, against autograd over the whole model and against divergences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halfweight import Recipe, RunError, compress_checkpoint
from halfweight.compress import backward
from halfweight.compress.blocks import BlockWalker, open_dense
from halfweight.compress.journal import Journal
from halfweight.compress.report import Progress
from halfweight.compress.tuning.metric import metric, remember_metrics, remembered
from runs import break_gradients, contents, goes_through_once, parsed

WINDOWS = list(torch.randint(3, 40, (6, 200), generator=torch.Generator().manual_seed(0)))
FIRST = 2  # of 200 tokens, which do not count


def silent(text: str) -> None:
    pass


def walk(folder: Path) -> BlockWalker:
    return BlockWalker(open_dense(folder), torch.device("cpu"), torch.float32)


def whole(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_it_is_that_of_the_whole_model(llama: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    remember_metrics(walk(llama), WINDOWS, journal, 7, silent)
    model = whole(llama)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, y: outputs.append(y))
    logits = model(torch.stack(WINDOWS)).logits
    generator = torch.Generator().manual_seed(7)
    labels = [torch.multinomial(row.detach().softmax(-1), 1, generator=generator)[:, 0] for row in logits]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum")
    for index, (y, g) in enumerate(zip(outputs, torch.autograd.grad(loss, outputs), strict=True)):
        expected = (g * y.norm(dim=-1, keepdim=True))[:, FIRST:].square().mean((0, 1))
        found = remembered(journal, f"model.layers.{index}")
        torch.testing.assert_close(found, expected / expected.mean() + 1e-3, rtol=1e-3, atol=1e-4)


def test_errors_that_cost_more_make_predictions_diverge_more(llama: Path) -> None:
    for turn in backward.backward(walk(llama), WINDOWS, 0, silent):
        costs = metric(turn.outputs, turn.gradients)
        errors = (torch.eye(len(costs))[int(i)] for i in (costs.argmin(), costs.argmax()))
        cheap, dear = (diverging(whole(llama), turn.index, 0.01 * error) for error in errors)
        # To second order they are as the costs, which are of a few drawn labels.
        assert dear / cheap == pytest.approx(float(costs.max() / costs.min()), rel=0.5)
        assert dear > 1.5 * cheap
        turn.back()


def test_a_channel_that_norms_leave_out_costs_little_however_large_it_is(llama: Path, tmp_path: Path) -> None:
    model = whole(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 20.0
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter[3] = 0.0
    model.save_pretrained(tmp_path / "model")
    for turn in backward.backward(walk(tmp_path / "model"), WINDOWS, 0, silent):
        power = torch.cat(turn.outputs).square().mean((0, 1))
        assert power[3] > 10 * power.sum().sub(power[3])
        assert metric(turn.outputs, turn.gradients)[3] < 0.1
        turn.back()


def diverging(model: nn.Module, index: int, error: Tensor) -> float:
    """KL per token when every token's output of a block moves by `error` times its length."""
    tokens = torch.stack(WINDOWS)
    with torch.no_grad():
        dense = model(tokens).logits.log_softmax(-1)
        model.model.layers[index].register_forward_hook(lambda m, a, y: y + y.norm(dim=-1, keepdim=True) * error)
        moved = model(tokens).logits.log_softmax(-1)
    return float((dense.exp() * (dense - moved)).sum(-1)[:, FIRST:].mean())


def test_first_tokens_do_not_count_and_lengths_do() -> None:
    outputs = torch.ones(1, 100, 3)
    outputs[0, 1] *= 10
    gradients = torch.tensor([[[9.0, 9, 9], [0, 1, 0]] + [[1, 0, 0]] * 98])
    found = metric([outputs], [gradients]) - 1e-3
    assert torch.allclose(found, 3 * torch.tensor([98.0, 100, 0]) / 198, atol=1e-6)
    assert torch.allclose(metric([torch.ones(1, 4, 3)], [torch.zeros(1, 4, 3)]), torch.full((3,), 1e-3))


def test_a_run_finds_it_once(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = tuned(text_file)
    compress_checkpoint(llama, settings, tmp_path / "whole")
    goes_through_once("metric", llama, settings, tmp_path / "out", tmp_path / "whole")


def test_a_run_that_is_stopped_before_it_is_whole_begins_it_again(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = tuned(text_file)
    compress_checkpoint(llama, settings, tmp_path / "whole")

    def stop(step: Progress) -> None:
        if step.stage == "metric" and step.done == step.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(llama, settings, tmp_path / "out", progress=stop)
    compress_checkpoint(llama, settings, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_gradients_that_are_not_finite_name_the_block(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch)
    with pytest.raises(RunError, match=r"model.layers.1: the gradients through it are not finite"):
        compress_checkpoint(llama, tuned(text_file), tmp_path / "out")


def tuned(text: Path) -> Recipe:
    base = parsed(text, {"pass": "rtn", "group_size": 16, "bits": 3}, seqlen=64, samples=4)
    return Recipe.parse({**base.model_dump(by_alias=True), "tuning": {"block": {"epochs": 1, "evaluations": 1}}})
