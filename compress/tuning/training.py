"""What both stages train with: AdamW on relative rates, gradients through weights that are made once per step, and
the rule that the best look at the dev set wins, the start included."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import Part, Rates

_WARM, _FLOOR = 0.1, 0.05  # share of the steps that warm up, and of the rate that is left in the end


class Trainer:
    """AdamW over named parameters, each with the rate of its part, on a schedule of `steps` steps."""

    def __init__(self, parameters: Mapping[str, tuple[Part, nn.Parameter]], rates: Rates, steps: int) -> None:
        self.parameters = {name: parameter for name, (_, parameter) in parameters.items()}
        self.steps, self.done = steps, 0
        by_part: dict[Part, list[nn.Parameter]] = {}
        for part, parameter in parameters.values():
            by_part.setdefault(part, []).append(parameter)
        self._rates = [float(getattr(rates, part)) for part in by_part] or [0.0]
        groups = [{"params": members} for members in by_part.values()] or [{"params": []}]
        # Fused: the other implementations need as much again for scratch.
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def apply(self) -> None:
        """One step on the gradients that have been gathered, which are dropped."""
        factor = schedule(self.done, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def finite(self) -> bool:
        """Whether all gradients are finite."""
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return bool(torch.stack([grad.isfinite().all() for grad in grads]).all()) if grads else True

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters, in host memory."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Set the parameters to those of `snapshot`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot[name])

    def state(self) -> dict[str, Tensor]:
        """Parameters and AdamW's moments by name, for a checkpoint; empty moments before the first step."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = value
        return tensors

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Go on from the `state` after `done` steps."""
        self.restore({name: tensors[f"parameter/{name}"] for name in self.parameters})
        for name, parameter in self.parameters.items():
            moments = {k.partition("/")[0]: t for k, t in tensors.items() if k.partition("/")[2] == name}
            moments.pop("parameter")
            moments.pop("best", None)
            if moments:
                self.optimizer.state[parameter] = {
                    moment: value.to(parameter.device, copy=True) for moment, value in moments.items()
                }
        self.done = done


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates at `step` (from 0): a linear rise, then a cosine down to a twentieth."""
    warm = max(1, round(_WARM * steps))
    if step < warm:
        return (step + 1) / (warm + 1)
    along = (step - warm) / max(1, steps - warm)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * along))


@dataclass
class Looks:
    """The dev losses seen so far, `losses` (step, loss) from the start on, and the parameters at the lowest one."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = math.inf

    def see(self, step: int, loss: float, trainer: Trainer) -> None:
        """Note the dev loss after `step` steps; the first is the start's. One that is not finite counts as the largest
        number there is, so that it is never the best, and can be written as JSON."""
        loss = loss if math.isfinite(loss) else sys.float_info.max
        if not self.losses or loss < self.best_loss:
            self.best, self.best_step, self.best_loss = trainer.snapshot(), step, loss
        self.losses.append((step, loss))

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` looks were no better than one before them."""
        return len(self.losses) > patience and self.best_step < self.losses[-patience][0]


def look_steps(steps: int, evaluations: int) -> set[int]:
    """After which of `steps` steps to look at the dev set: `evaluations` times, evenly, the end included."""
    return {round(steps * (i + 1) / evaluations) for i in range(evaluations)} - {0}


def batches(items: int, together: int, epochs: int, seed: int) -> list[list[int]]:
    """Item numbers of each step: every epoch in another order, which `seed` fixes."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(epochs):
        order = torch.randperm(items, generator=generator).tolist()
        steps += [order[i : i + together] for i in range(0, items, together)]
    return steps


def through(weights: Mapping[str, Tensor], run: Callable[[dict[str, Tensor]], None]) -> None:
    """Call `run(leaves)`, which runs backward into the leaves as often as it likes, and pass their sums on.

    So a weight that is costly to make is made once per step, and gradients are summed in its own precision.
    """
    leaves = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in weights.items()}
    run(leaves)
    pairs = [(weights[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([weight for weight, _ in pairs], [grad for _, grad in pairs])
