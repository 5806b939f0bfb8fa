"""One pass forward and one backward through the dense model, a block in memory at a time: how its predictions move with
what is inside.

The gradients are those of labels that are drawn from the predictions themselves, whose squares are the Fisher
information: to second order, how far the predictions diverge (KL) when something moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..eval.selection import dense_tokens_of
from ..serving.errors import RunError
from .blocks import BlockWalker
from .tuning.teacher import chunks

TOKENS = 8192  # of the calibration, at most
_LOGITS = 2**22  # that exist at once, fp32

# Of a linear: its name, the inputs [tokens, K] that count and the gradients [tokens, N] at its outputs.
See = Callable[[str, Tensor, Tensor], None]


def _ignore(name: str, x: Tensor, gradient: Tensor) -> None:
    pass


@dataclass
class Turn:
    """A block, in memory, on the way back. `inputs` and `outputs` `[B, T, D]` are on the host; `gradients` are at the
    outputs, and at the inputs once `back` has been called, as it must be."""

    index: int
    run: Callable[[Tensor], Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    gradients: list[Tensor]

    def back(self, linears: Mapping[str, nn.Linear] | None = None, see: See = _ignore) -> None:
        """Go through the block; `see` gets what concerns each of its `linears`."""
        for number, x in enumerate(self.inputs):
            gradient = self.gradients[number]
            self.gradients[number] = _through(self.run, x.to(gradient.device), gradient, linears or {}, see)


def backward(walker: BlockWalker, windows: Sequence[Tensor], seed: int, say: Callable[[str], None]) -> Iterator[Turn]:
    """The blocks from the last to the first, for `windows` `[T]` and labels drawn by `seed`. All blocks' inputs are on
    the host; `say` is told what is going on, `2 * blocks + 1` times."""
    inputs: list[list[Tensor]] = []
    stream = walker.embed(list(windows))
    for index in range(walker.n_blocks):
        say(f"forward through {walker.block_prefix(index)}")
        inputs.append([x.cpu() for x in stream])
        with walker.block(index) as block:
            stream = [walker.run(index, block, x) for x in stream]
    say("labels")
    gradients = label_gradients(walker, stream, windows, seed)
    outputs = [x.cpu() for x in stream]
    del stream
    for index in reversed(range(walker.n_blocks)):
        say(f"backward through {walker.block_prefix(index)}")
        with walker.block(index) as block:
            turn = Turn(index, partial(walker.call, index, block, weights={}), inputs.pop(), outputs, gradients)
            yield turn
        outputs = turn.inputs


def label_gradients(
    walker: BlockWalker, outputs: Sequence[Tensor], windows: Sequence[Tensor], seed: int
) -> list[Tensor]:
    """The gradient of the summed cross entropy of drawn labels at the last block's `outputs` `[B, T, D]`, likewise."""
    generator = torch.Generator(walker.device).manual_seed(seed)
    rows = [row[None].detach().requires_grad_() for x in outputs for row in x]
    with walker.vocabulary(), torch.enable_grad():
        for row, window in zip(rows, windows, strict=True):
            for keep in chunks(walker, len(window), _LOGITS):
                logits = walker.logits(walker.decoded(row, window), window, keep)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    found = torch.cat([row.grad for row in rows if row.grad is not None])
    return list(found.split([len(x) for x in outputs]))


def that_count(x: Tensor) -> Tensor:
    """`x` `[B, T, D]` without the first tokens of each window, as `[tokens, D]`: they read everything when models are
    scored, and a few of them would outweigh all others."""
    first = dense_tokens_of(x.shape[1]) if x.ndim == 3 else 0
    return x.detach()[..., first:, :].reshape(-1, x.shape[-1])


def _through(
    run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, linears: Mapping[str, nn.Linear], see: See
) -> Tensor:
    """The gradient at a block's input `x` from the `gradient` at its output `run(x)`."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def at_output(gradient: Tensor) -> None:
                with torch.no_grad():
                    see(name, that_count(args[0]), that_count(gradient))

            output.register_hook(at_output)

        return forward

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(watch(name)).remove)
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(run(start), start, gradient)
    return found


def require_finite(name: str, gradients: Tensor) -> None:
    """Raise RunError when what gradients say of `name` is not finite."""
    if not bool(torch.isfinite(gradients).all()):
        raise RunError(f"{name}: the gradients through it are not finite; try --dtype float32")
