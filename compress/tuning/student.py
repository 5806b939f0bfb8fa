"""The compressed model while it is trained: forward and backward through its blocks, one block's weights at a time.

The forward pass keeps the inputs of every block and nothing else; the backward pass runs each block again, with
gradients (Chen et al. 2016, arXiv 1604.06174). A block's weights are expanded from their stored form when it is its
turn, once for all windows of a step, so memory holds the stored form and one block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...serving.checkpoint import TensorInfo
from ..blocks import BlockWalker
from ..passes import StageConfig
from .config import Part
from .training import through
from .weights import FloatWeight, TrainedLinear, stored_tensors, trainable_weights, trained_parameters


class StudentBlock:
    """One decoder block: what is trained, the rest of its weights, and how to run it."""

    def __init__(
        self,
        walker: BlockWalker,
        index: int,
        stages: Mapping[str, StageConfig],
        stored: Mapping[str, Tensor],
        checkpoint: Mapping[str, TensorInfo],
        train: Collection[Part],
    ) -> None:
        """`stored` are the tensors that block `index` has so far, by full name."""
        self.walker, self.index, self.prefix = walker, index, walker.block_prefix(index)
        here = {name: tensor.to(walker.device) for name, tensor in stored.items()}
        with walker.block(index) as block:
            self.module = block
            self.weights: dict[str, TrainedLinear | FloatWeight] = trainable_weights(
                block, self.prefix, stages, here, checkpoint, train, codes=False
            )
            own = {name: tensor for name, tensor in block.state_dict().items() if name not in self.weights}
        self.rest = {name: here.get(f"{self.prefix}.{name}", tensor).to(tensor.dtype) for name, tensor in own.items()}

    def expand(self) -> dict[str, Tensor]:
        """The trained weights, fp32, by name inside the block; with gradients where they are enabled."""
        return {name: module() for name, module in self.weights.items()}

    def run(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Output `[B, T, D]` for `x` `[B, T, D]` with the expanded `weights`."""
        cast = {name: weight.to(self.walker.dtype) for name, weight in weights.items()}
        return self.walker.call(self.index, self.module, x, {**self.rest, **cast})

    def parameters(self) -> dict[str, tuple[Part, nn.Parameter]]:
        """Everything that is trained, by full name."""
        return {f"{self.prefix}.{name}": value for name, value in trained_parameters(self.weights).items()}

    def stored(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to store for it now, by full name; `before` is what it was made from."""
        here = {name: tensor.to(self.walker.device) for name, tensor in before.items()}
        return {**before, **stored_tensors(self.weights, self.prefix, here)}


class Student:
    """All blocks in order."""

    def __init__(self, blocks: Sequence[StudentBlock]) -> None:
        self.blocks = list(blocks)

    def parameters(self) -> dict[str, tuple[Part, nn.Parameter]]:
        """Everything that is trained, by full name."""
        return {name: value for block in self.blocks for name, value in block.parameters().items()}

    @torch.no_grad()
    def forward(self, xs: list[Tensor]) -> list[list[Tensor]]:
        """The inputs of every block, starting with `xs` (batches `[B, T, D]`), and the outputs of the last."""
        streams = [xs]
        for block in self.blocks:
            weights = block.expand()
            streams.append([block.run(x, weights) for x in streams[-1]])
        return streams

    @torch.no_grad()
    def outputs(self, xs: list[Tensor]) -> list[Tensor]:
        """The outputs of the last block alone."""
        for block in self.blocks:
            weights = block.expand()
            xs = [block.run(x, weights) for x in xs]
        return xs

    def backward(self, streams: list[list[Tensor]], grads: list[Tensor]) -> None:
        """Add to all gradients, from the inputs of every block and the gradients of the last block's outputs."""
        for block, xs in zip(reversed(self.blocks), reversed(streams[:-1]), strict=True):
            before: list[Tensor] = []

            def run(
                leaves: dict[str, Tensor],
                block: StudentBlock = block,
                xs: list[Tensor] = xs,
                after: list[Tensor] = grads,
                before: list[Tensor] = before,
            ) -> None:
                for x, grad in zip(xs, after, strict=True):
                    leaf = x.detach().requires_grad_()
                    block.run(leaf, leaves).backward(grad)
                    assert leaf.grad is not None
                    before.append(leaf.grad)

            through(block.expand(), run)
            grads = before
