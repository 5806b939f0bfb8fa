"""Stage 1: one block at a time, trained to give what the dense block gave (as in EfficientQAT's Block-AP, Chen et al.
2024, arXiv 2407.11062, and EBFT, Guo et al. 2024, arXiv 2402.12419), as far as the predictions mind (`metric.py`).

The student gets the compressed model's inputs, the target is the dense block's output for dense inputs, so a block also
makes up for what the blocks before it lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...serving.errors import RunError
from ..blocks import BlockWalker
from ..memory import is_out_of_memory
from ..report import TuningReport
from .config import BlockTuning, Part
from .training import Looks, Trainer, batches, look_steps, through
from .weights import Weights, trained_parameters

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pairs:
    """Inputs of the compressed block and wanted outputs, in batches `[B, T, D]`, looked at as seldom as can be."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def pick(self, items: Sequence[int]) -> Pairs:
        """Some of the batches."""
        return Pairs([self.inputs[i] for i in items], [self.targets[i] for i in items])

    @property
    def tokens(self) -> int:
        """How many tokens they hold."""
        return sum(x.shape[0] * x.shape[1] for x in self.inputs)


def tune_block(
    walker: BlockWalker,
    index: int,
    block: nn.Module,
    weights: Weights,
    train: Pairs,
    dev: Pairs,
    metric: Tensor,
    settings: BlockTuning,
    *,
    seed: int,
    say: Say,
) -> TuningReport:
    """Train `weights` (by name inside `block`) in place; they end where the dev loss was lowest, the start included.
    An error in a channel of its outputs counts as `metric` `[D]` says (`metric.py`).

    When a loss or gradient is not finite, the report has a note and the weights are not to be used. Raises RunError
    when not even one window fits in memory.
    """
    begin = time.monotonic()
    run = _Training(walker, index, block, weights, train, dev, metric, settings, say)
    order = batches(len(train.inputs), max(1, settings.batch // len(train.inputs[0])), settings.epochs, seed)
    units = _units(weights) if settings.units == "separately" else [list(weights)]
    for number, unit in enumerate(units):
        part = slice(len(order) * number // len(units), len(order) * (number + 1) // len(units))
        run.unit({name: weights[name] for name in unit}, order[part], len(order))
    if not run.losses:
        run.losses, run.note = [(0, run.dev_loss())], "there is nothing to train"
    return TuningReport(
        stage="block",
        name=walker.block_prefix(index),
        steps=run.steps,
        tokens=run.tokens,
        start=run.losses[0][1],
        best=min(loss for _, loss in run.losses),
        best_step=run.best_step,
        losses=run.losses,
        seconds=time.monotonic() - begin,
        note=run.note,
    )


def distance(y: Tensor, target: Tensor, metric: Tensor) -> Tensor:
    """Mean over tokens of sum_d metric_d (y - target)_d^2 / ||target||^2, for `[B, T, D]` and `metric` `[D]`.

    Relative to each token, because the next norm rescales each token; a plain mean would be of the few tokens whose
    activations are a thousand times the others'.
    """
    wanted = target.float()
    power = wanted.square().sum(-1)
    return ((y.float() - wanted).square() @ metric / power.clamp(min=1e-12)).mean()


@dataclass
class _Training:
    """The training of one block, and what there is to report of it so far."""

    walker: BlockWalker
    index: int
    block: nn.Module
    weights: Weights
    train: Pairs
    dev: Pairs
    metric: Tensor
    settings: BlockTuning
    say: Say
    rows: int | None = None  # windows per forward pass; None: whole batches
    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    best_step: int = 0
    note: str | None = None

    def unit(self, weights: Weights, order: Sequence[Sequence[int]], total: int) -> None:
        """Train the part `weights` of the block on the batches that `order` names, a step each."""
        parameters = trained_parameters(weights)
        if self.note is not None or not parameters:
            return
        with _only(parameters, self.weights):
            trainer, looks, before = Trainer(parameters, self.settings.rates, len(order)), Looks(), self.steps
            looks.see(0, self.dev_loss(), trainer)
            at, clock = look_steps(len(order), self.settings.evaluations), time.monotonic()
            for items in order:
                batch = self.train.pick(items)
                loss = self.gradients(batch)
                if not (math.isfinite(loss) and trainer.finite()):
                    self.note = f"the loss was not finite at step {self.steps + 1}; the block stayed as it was"
                    break
                trainer.apply()
                self.steps, self.tokens = self.steps + 1, self.tokens + batch.tokens
                if trainer.done in at:
                    looks.see(trainer.done, self.dev_loss(), trainer)
                    if looks.exhausted(self.settings.patience):
                        break
                left = (time.monotonic() - clock) / trainer.done * (total - self.steps)
                gain = f"dev {looks.losses[0][1]:.2e} -> {looks.best_loss:.2e}"
                self.say(f"tuning, step {self.steps} of {total}, loss {loss:.2e}, {gain}, {left:.0f} s left")
            trainer.restore(looks.best)
        self.losses += [(before + step, loss) for step, loss in looks.losses]
        self.best_step = before + looks.best_step if looks.best_step else self.best_step

    def gradients(self, batch: Pairs) -> float:
        """Gather the gradients of the batch's loss, which is returned."""
        while True:
            total = 0.0

            def run(leaves: dict[str, Tensor], batch: Pairs = batch) -> None:
                nonlocal total
                for x, target in self.pieces(batch):
                    y = self.walker.call(self.index, self.block, x, self.cast(leaves))
                    loss = distance(y, target, self.metric) * (x.shape[0] * x.shape[1] / batch.tokens)
                    loss.backward()
                    total += float(loss.detach())

            try:
                with torch.enable_grad():
                    through({name: module() for name, module in self.weights.items()}, run)
                return total
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.make_smaller()

    def make_smaller(self) -> None:
        """After an allocation failed: one window at a time from now on, or RunError when it is that already."""
        for module in self.weights.values():
            module.zero_grad(set_to_none=True)
        length = self.train.inputs[0].shape[1]
        if self.rows == 1 or len(self.train.inputs[0]) == 1:
            raise RunError(
                f"{self.walker.block_prefix(self.index)}: training on one window of {length} tokens does not fit in"
                " memory; use a smaller --seqlen, or a device with more memory"
            )
        self.rows = 1
        self.walker.learn(1, length)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def pieces(self, batch: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch's inputs and targets, as many windows at a time as fit."""
        for x, target in zip(batch.inputs, batch.targets, strict=True):
            rows = self.rows or len(x)
            yield from zip(x.split(rows), target.split(rows), strict=True)

    @torch.no_grad()
    def dev_loss(self) -> float:
        """The loss on the dev set."""
        weights = self.cast({name: module() for name, module in self.weights.items()})
        found, tokens = 0.0, 0
        for x, target in zip(self.dev.inputs, self.dev.targets, strict=True):
            size = x.shape[0] * x.shape[1]
            y = self.walker.call(self.index, self.block, x, weights)
            found += float(distance(y, target, self.metric)) * size
            tokens += size
        return found / tokens

    def cast(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` in the dtype the block computes in."""
        return {name: weight.to(self.walker.dtype) for name, weight in weights.items()}


@contextmanager
def _only(parameters: Mapping[str, tuple[Part, nn.Parameter]], weights: Weights) -> Iterator[None]:
    """Within the `with`, nothing of `weights` but `parameters` needs gradients."""
    every = [parameter for _, parameter in trained_parameters(weights).values()]
    for parameter in every:
        parameter.requires_grad_(False)
    for _, parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in every:
            parameter.requires_grad_(True)


def _units(weights: Weights) -> list[list[str]]:
    """Names of `weights` by the block's submodule they are in, the first (attention) apart from all that follow."""
    first = next(iter(weights)).partition(".")[0]
    attention = [name for name in weights if name.partition(".")[0] == first]
    return [attention, [name for name in weights if name not in attention]]
