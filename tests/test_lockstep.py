"""Forward passes that wait for each other: what they are given, what they give, and what irregular blocks are told."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from halfweight.compress.lockstep import PausingPass, RestartingPass, input_groups, pauses
from halfweight.compress.statistics import spread_rows
from halfweight.serving.errors import RunError


class Attention(nn.Module):
    """Linears that share an input, one that gets an equal copy, and one with its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "copy", "o"):
            self.add_module(name, nn.Linear(8, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) + self.k(x) + self.v(x)
        return self.o(mixed + self.copy(x.clone()))

    def linears(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.named_children() if isinstance(module, nn.Linear)}

    def hooked(self) -> bool:
        return any(module._forward_pre_hooks for module in self.modules())


@pytest.fixture
def block() -> Attention:
    torch.manual_seed(0)
    return Attention().requires_grad_(False)


def test_linears_on_one_tensor_form_a_group(block: Attention) -> None:
    assert input_groups(block.linears(), lambda: block(torch.ones(1, 2, 8))) == [["q", "k", "v"], ["copy"], ["o"]]
    assert not block.hooked()


@pytest.mark.parametrize("start", [PausingPass, lambda forward, x: RestartingPass(forward, lambda: x)])
def test_each_linear_is_solved_for_what_the_solved_ones_before_it_give(
    start: Callable[..., PausingPass | RestartingPass], block: Attention
) -> None:
    """Replacing linears one by one in paused passes equals running the changed block from the start each time."""
    inputs = [torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(tokens)) for tokens in (3, 5, 4)]
    passes = [start(block, x) for x in inputs]
    with pauses({name: block.linears()[name] for name in ("q", "copy", "o")}):
        for name, group in (("q", ["q", "k", "v"]), ("copy", ["copy"]), ("o", ["o"])):
            got = [forward.run_to(name) for forward in passes]
            fresh = {"q": lambda x: x, "copy": lambda x: x, "o": lambda x: block_without_pauses(block, x)}[name]
            for x, given in zip(inputs, got, strict=True):
                torch.testing.assert_close(given, fresh(x))
            for linear in group:
                block.linears()[linear].weight.mul_(0.5)
        outputs = [forward.finish() for forward in passes]
    assert not block.hooked()
    for x, output in zip(inputs, outputs, strict=True):
        assert torch.equal(output, block(x))


def block_without_pauses(block: Attention, x: Tensor) -> Tensor:
    """The input of `o`, by the block's formula and its weights of now."""
    q, k, v, copy = (block.linears()[name].weight for name in ("q", "k", "v", "copy"))
    return x @ (q + k + v + copy).T


def test_hooks_are_removed_and_errors_come_out_of_a_pass(block: Attention) -> None:
    def fail(x: Tensor) -> Tensor:
        block.q(x)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"), pauses({"q": block.q}):
        forward = PausingPass(fail, torch.ones(1, 2, 8))
        forward.run_to("q")
        forward.finish()
    with pytest.raises(ValueError, match="boom"):
        input_groups(block.linears(), lambda: fail(torch.ones(1, 2, 8)))
    assert not block.hooked()


def test_an_abandoned_pass_unwinds(block: Attention) -> None:
    left: list[str] = []

    def watched(x: Tensor) -> Tensor:
        try:
            return block(x)
        finally:
            left.append("unwound")

    with pauses({"o": block.o}):
        forward = PausingPass(watched, torch.ones(1, 2, 8))
        forward.run_to("o")
        del forward
    assert left == ["unwound"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda block, x: block.q(x), r"^k: received no calibration tokens"),
        (lambda block, x: block(block(x)), r"^q: is called 2 times in one forward pass"),
    ],
)
def test_linears_that_are_not_called_exactly_once_are_named(block: Attention, run: object, message: str) -> None:
    with pytest.raises(RunError, match=message):
        input_groups(block.linears(), lambda: run(block, torch.ones(1, 2, 8)))  # type: ignore[operator]


def test_passes_that_take_other_ways_are_named(block: Attention) -> None:
    def routed(x: Tensor) -> Tensor:
        return block.q(x) if x.sum() > 0 else block.k(block.q(x))

    with pauses({"q": block.q, "k": block.k}):
        short, long = (PausingPass(routed, x) for x in (torch.ones(1, 8), -torch.ones(1, 8)))
        for forward in (short, long):
            forward.run_to("q")
        with pytest.raises(RunError, match=r"^k: is called in some forward passes only"):
            long.finish()
        with pytest.raises(RunError, match=r"^k: is not called at the same point of every forward pass"):
            short.run_to("k")


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"), [(5, 256, 5), (256, 256, 256), (257, 256, 129), (900, 256, 225), (10, 3, 3)]
)
def test_spread_rows_are_even_and_at_most_as_many_as_asked_for(tokens: int, rows: int, expected: int) -> None:
    x = torch.arange(tokens, dtype=torch.float32)[None, :, None].repeat(1, 1, 8)
    spread = spread_rows(x, rows)
    assert tuple(spread.shape) == (expected, 8)
    chosen = spread[:, 0].tolist()
    assert len({after - before for before, after in pairwise(chosen)}) <= 1
    x.zero_()
    assert spread[:, 0].tolist() == chosen
