"""What errors in a block's outputs cost the model's predictions, channel by channel.

When a token's output of a block moves by e, the predictions diverge (KL) to second order by half of the mean of
`(g . e)^2` over labels drawn from them, with g the gradient of the labels' cross entropy there. This takes the diagonal
of that Fisher information, as BRECQ (Li et al. 2021, arXiv 2102.05426) does, and its mean over tokens. Errors and
gradients are relative to a token's length, because the next norm rescales each token: `mean_t ||y_t||^2 g_t^2` `[D]`.

Without it a block is trained on what the predictions hardly look at: a few channels of the residual stream may hold
most of its power.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backward import TOKENS, backward, require_finite, that_count
from ..blocks import BlockWalker
from ..calibration import first_windows
from ..journal import Journal
from ..writer import read_part

_PART = "metric.safetensors"
_LEAST = 1e-3  # that an error costs in any channel; the mean is 1


def remember_metrics(
    walker: BlockWalker, windows: Sequence[Tensor], journal: Journal, seed: int, say: Callable[[str], None]
) -> None:
    """Put the metrics of all blocks into a part of the journal, unless they are there.

    `windows` `[T]` are the calibration's, of which the first are used, and labels are drawn by `seed`; `say` is told
    which block it is. Raises RunError where gradients are not finite.
    """
    if journal.done(_PART):
        return
    found = {}
    for turn in backward(walker, first_windows(windows, TOKENS), seed, say):
        prefix = walker.block_prefix(turn.index)
        found[prefix] = metric(turn.outputs, turn.gradients).cpu()
        require_finite(prefix, found[prefix])
        turn.back()
    journal.store(_PART, found)


def remembered(journal: Journal, prefix: str) -> Tensor:
    """The metric of the block that is called `prefix`."""
    return read_part(journal.folder / _PART)[prefix]


def metric(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The costs `[D]`, fp32, by channel of a block with `outputs` `[B, T, D]` and the `gradients` there. But for a
    factor: their mean is 1, where there are gradients, and a thousandth more."""
    sums = []
    for y, gradient in zip(outputs, gradients, strict=True):
        power = that_count(y.to(gradient.device)).float().square().sum(-1, keepdim=True)
        sums.append((power * that_count(gradient).float().square()).sum(0))
    total = torch.stack(sums).sum(0)
    return total / total.mean().clamp(min=torch.finfo(torch.float32).tiny) + _LEAST
