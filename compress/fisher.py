"""What a model's predictions lose when one of its linears reads less: error curves that compare linears of all blocks.

Let a linear's output for token t move by e_t. To second order the predictions then diverge (KL) from what they were by
half of the mean of `(sum_t g_t . e_t)^2` over labels drawn from them, with g_t the gradient of the labels' summed cross
entropy at that output: the Fisher information, as a measure of what may be removed (Theis et al. 2018, arXiv
1801.05787). Terms of different tokens are taken as independent here, `sum_t (g_t . e_t)^2`, and so are linears, whose
losses add up.

With `e_t = -W (x_t - select(x_t))` one backward pass prices every share of inputs of every linear. It is taken at the
dense model, whose predictions have no slope in KL; where much is left out already they have one, which this leaves out.
The second order grows without bound, and a few tokens would decide alone. So the first of a window are left out, which
read everything when models are scored, and terms count as `log(1 + term)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..eval.selection import dense_tokens_of
from ..serving.errors import RunError
from .allocation import divide, selection_of_stage, weight_bits, without_branch
from .blocks import BlockWalker
from .passes import StageConfig
from .passes.selection import column_norms, scores
from .quantiles import QuantileSketch
from .tuning.teacher import chunks

TOKENS = 8192  # of the calibration, at most
LEVELS = tuple(number / 10 for number in range(1, 10))
_LOGITS = 2**22  # that exist at once, fp32

Curves = dict[str, dict[float, float]]


def allocate_by_fisher(
    walker: BlockWalker,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """A sparsity for each linear whose stage (by name) says `allocation: fisher`, such that together they leave as many
    of their weights' bytes unread as with the sparsities of their stages, and the predictions lose least.

    `windows` `[T]` are the calibration's, of which the first are used, and labels are drawn by `seed`. One block's
    weights are held at a time, besides the inputs of all blocks; `say` is told which block it is. Raises RunError where
    gradients are not finite.
    """
    sharing, shapes = {name: stage for name, stage in stages.items() if stage.shares_by_fisher}, walker.linear_shapes()
    curves = prediction_curves(walker, sharing, windows, seed, say)
    weights = {name: weight_bits(stage, shapes[name]) for name, stage in sharing.items()}
    return divide(curves, weights, {name: selection_of_stage(stage).sparsity for name, stage in sharing.items()})


def prediction_curves(
    walker: BlockWalker,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    seed: int,
    say: Callable[[str], None],
) -> Curves:
    """For each linear of `stages`: sparsity -> `sum_t log(1 + (g_t . e_t)^2)`, at tenths and at the stage's
    own. Arguments as for `allocate_by_fisher`."""
    few = list(windows[: max(1, TOKENS // len(windows[0]))])
    curves: Curves = {name: {} for name in stages}
    inputs: list[list[Tensor]] = []  # of every block, on the host
    stream = walker.embed(few)
    for index in range(walker.n_blocks):
        say(f"forward through {walker.block_prefix(index)}")
        inputs.append([x.cpu() for x in stream])
        with walker.block(index) as block:
            stream = [walker.run(index, block, x) for x in stream]
    say("labels")
    gradients = _label_gradients(walker, stream, few, seed)
    del stream
    for index in reversed(range(walker.n_blocks)):
        say(f"backward through {walker.block_prefix(index)}")
        with walker.block(index) as block:
            linears = {name: linear for name, linear in walker.block_linears(index).items() if name in stages}
            run = partial(walker.call, index, block, weights={})
            for number, x in enumerate(inputs.pop()):
                gradients[number] = _through(run, x.to(walker.device), gradients[number], linears, stages, curves)
    return curves


def _label_gradients(
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


def _through(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    gradient: Tensor,
    linears: Mapping[str, nn.Linear],
    stages: Mapping[str, StageConfig],
    curves: Curves,
) -> Tensor:
    """The gradient at a block's input `x` from the `gradient` at its output `run(x)`; adds what the block's `linears`
    lose to their `curves`."""

    def watch(name: str, linear: nn.Linear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(partial(_add_losses, curves[name], name, linear, stages[name], args[0].detach()))

        return see

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(watch(name, linear)).remove)
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(run(start), start, gradient)
    return found


@torch.no_grad()
def _add_losses(
    curve: dict[float, float], name: str, linear: nn.Linear, stage: StageConfig, x: Tensor, gradient: Tensor
) -> None:
    """Add to the `curve` of a linear what the predictions lose for its inputs `x` `[B, T, K]`, of which more and more
    are not read, with the `gradient` `[B, T, N]` at its output."""
    first = dense_tokens_of(x.shape[1]) if x.ndim == 3 else 0
    x, gradient = (part[..., first:, :].reshape(-1, part.shape[-1]) for part in (x, gradient))
    worth = (gradient @ linear.weight).float() * x.float()  # of x_j: its part of g . y
    if not bool(torch.isfinite(worth).all()):
        raise RunError(f"{name}: the gradients through it are not finite; try --dtype float32, or allocation: greedy")
    score = scores(x, column_norms(linear.weight, selection_of_stage(stage).score))
    sketch = QuantileSketch()
    sketch.add(score)
    shape = (linear.out_features, linear.in_features)
    for level, trial, scheme in without_branch(stage, shape, LEVELS):
        unread = score <= sketch.quantile(1 - trial.split(shape, scheme).inputs)
        lost = torch.where(unread, worth, 0.0).sum(-1).square()
        curve[level] = curve.get(level, 0.0) + float(lost.log1p().sum())
