"""What a block's errors cost the model's predictions, direction by direction.

When a token's output of a block moves by e, the predictions diverge (KL) to second order by half of the mean of
`(g . e)^2` over labels drawn from them, with g the gradient of the labels' cross entropy there: the Fisher information,
whose diagonal BRECQ (Li et al. 2021, arXiv 2102.05426) reconstructs blocks by. Here it is the tokens' mean, and more
than the diagonal.
Errors and gradients are relative to a token's length, because the next norm rescales each token:
`M = mean_t ||y_t||^2 g_t g_t^T` `[D, D]`.

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

# Towards the diagonal: the whole information does better on one model that this was tried on, its diagonal on another.
_SHRINKAGE = 0.5
_LEAST = 1e-3  # that an error costs in any direction; the mean channel has 1


def remember_metrics(
    walker: BlockWalker, windows: Sequence[Tensor], journal: Journal, seed: int, say: Callable[[str], None]
) -> None:
    """Put the roots of all blocks' metrics into parts of the journal, as far as they are not there.

    `windows` `[T]` are the calibration's, of which the first are used, and labels are drawn by `seed`; `say` is told
    which block it is. Raises RunError where gradients are not finite.
    """
    if all(journal.done(_part(index)) for index in range(walker.n_blocks)):
        return
    for turn in backward(walker, first_windows(windows, TOKENS), seed, say):
        if not journal.done(_part(turn.index)):
            found = metric(turn.outputs, turn.gradients)
            require_finite(walker.block_prefix(turn.index), found)
            journal.store(_part(turn.index), {"root": root(found).cpu()})
        turn.back()


def metric(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """M `[D, D]` of a block with `outputs` `[B, T, D]` and the `gradients` there, fp32, but for a factor: its mean
    diagonal is 1, unless there are no gradients."""
    total, tokens = torch.zeros(()), 0
    for y, gradient in zip(outputs, gradients, strict=True):
        length = that_count(y.to(gradient.device)).float().norm(dim=-1, keepdim=True)
        relative = length * that_count(gradient).float()
        total, tokens = total.to(gradient.device) + relative.T @ relative, tokens + len(relative)
    mean = total / max(1, tokens)
    return mean / mean.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)


def root(found: Tensor) -> Tensor:
    """R `[D, D]`, lower triangular: an error e `[D]` costs `||e R||^2`. That is by M, half of the way to its diagonal,
    and a little in every direction, so that R exists."""
    least = torch.full((len(found),), _LEAST, device=found.device)
    return torch.linalg.cholesky(torch.lerp(found, found.diagonal().diag(), _SHRINKAGE) + least.diag())


def remembered(journal: Journal, index: int) -> Tensor:
    """The root of block `index`."""
    return read_part(journal.folder / _part(index))["root"]


def _part(index: int) -> str:
    return f"metric-{index:05}.safetensors"
