"""What a candidate loses: the dense model in memory, whose linears select by budgets that change with every trial.

Nothing is compressed or written for a trial. Each linear's threshold is found on its inputs as they come, behind the
linears that select already, as the compression finds it later; so what is read is what the budget says, and no
statistics of other inputs stand in. The branches are gathered once, at their largest rank, of which a trial uses the
first columns: those are the smaller branch, exactly for the SVD of a weight, nearly for one fitted to inputs. Weights
stay dense: what a pass does to them is not part of the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...eval.selection import dense_tokens_of
from ...serving.errors import RunError
from ...serving.linear import SelectingLinear
from ...serving.storage import Selection
from ..allocation import error_curves, selecting_linears
from ..blocks import BlockWalker, batch_size
from ..calibration import first_windows
from ..memory import release_memory
from ..passes import StageConfig
from ..passes.base import Split
from ..passes.hessian import HessianError
from ..passes.low_rank import largest_singular
from ..passes.selection import UnreadInputs, column_norms, scores
from ..quantiles import QuantileSketch
from ..statistics import spread_rows
from ..tuning.teacher import chunks, divergence, log_probabilities
from .space import Budget, Space

Curves = dict[int, dict[str, dict[float, float]]]

GATHERED = 8192  # calibration tokens that branches and error curves are gathered on, at most
TOP = 128  # of the dense model's most likely tokens; the others are taken together
_LOGITS = 2**22  # that exist at once, fp32
_ROWS = 128  # inputs that a threshold is found on
_WORST = 1e9  # in place of an objective that is no number


class _Gathered(NamedTuple):
    """Of one linear: the norms in its scores, and the columns of its largest branch."""

    norms: Tensor | None
    v: Tensor | None
    u: Tensor | None


class Fitness:
    """`fitness(budgets)` is what the dense model loses when its linears read by `budgets`; `open_fitness` makes one.

    `curves` are the error curves of the blocks whose linears share their budget greedily.
    """

    def __init__(self, walker: BlockWalker, space: Space, windows: Sequence[Tensor]) -> None:
        self.curves: Curves = {}
        self._walker, self._space, self._windows = walker, space, list(windows)
        self._perplexity = space.settings.objective == "perplexity"
        self._dense_tokens = dense_tokens_of(len(windows[0]))
        self._embedded = torch.cat(walker.embed(self._windows))
        self._teacher: list[tuple[Tensor, Tensor]] = []
        self._gathered: dict[str, _Gathered] = {}
        self._splits: dict[str, Split] = {}

    @torch.no_grad()
    def __call__(self, budgets: Mapping[str, Budget]) -> float:
        self._splits = {name: self._space.members[name].split(budget) for name, budget in budgets.items()}
        losses = []
        for number, (targets, logits) in enumerate(self._logits()):
            if self._perplexity:
                losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            else:
                values, tokens = (part.to(logits.device) for part in self._teacher[number])
                losses.append(divergence(log_probabilities(logits, tokens), values))
        mean = float(torch.cat(losses).double().mean())
        if self._perplexity:
            mean = math.exp(min(mean, 100.0))
        return mean if mean < _WORST else _WORST  # the latter for NaN, too

    @torch.no_grad()
    def learn_dense(self) -> None:
        """Remember what the dense model says, as long as nothing selects."""
        for _, logits in [] if self._perplexity else self._logits():
            top = (logits - logits.logsumexp(-1, keepdim=True)).topk(min(TOP, logits.shape[-1]))
            self._teacher.append((top.values.cpu(), top.indices.cpu()))

    @torch.no_grad()
    def gather(self, index: int, block: nn.Module, stages: Mapping[str, StageConfig], inputs: list[Tensor]) -> None:
        """Learn what trials need to know about block `index`, whose calibration `inputs` become its outputs; from then
        on it selects."""
        made = selecting_linears(self._walker, index, stages, dense_tokens_of(inputs[0].shape[1]))
        linears = {name: linear for name, linear in made.items() if isinstance(linear, SelectingLinear)}
        run = partial(self._walker.run, index, block)
        greedy = {name: linear for name, linear in linears.items() if self._space.members[name].greedy}
        if greedy:  # one batch tells the linears of a block apart
            self.curves[index] = error_curves(run, greedy, stages, inputs[:1])
        unread = {name: UnreadInputs(linear.weight) for name, linear in linears.items() if self._fits(name)}
        handles = [
            linears[name].register_forward_pre_hook(self._collector(name, linears[name], into))
            for name, into in unread.items()
        ]
        for x in inputs:
            x.copy_(run(x))
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            self._gathered[name] = self._gather_one(name, linear, unread.pop(name, None))
            linear.forward = partial(self._forward, name, linear)  # type: ignore[method-assign]
        release_memory()

    def close(self) -> None:
        """Make the walker's linears ordinary ones again."""
        for name in self._gathered:
            del self._walker.model.get_submodule(name).forward

    def _logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Target tokens `[n]` and logits `[n, V]`, fp32, for all positions of the windows, some at a time."""
        walker = self._walker
        stream = list(self._embedded.clone().split(batch_size(len(self._windows[0]))))
        for index, block in enumerate(walker.blocks):
            for x in stream:
                x.copy_(walker.run(index, block, x))
        rows = (row[None] for x in stream for row in x)
        for row, window in zip(rows, self._windows, strict=True):
            output, targets = walker.decoded(row, window), window[1:].to(walker.device)
            for keep in chunks(walker, len(targets), _LOGITS):
                yield targets[keep], walker.logits(output, window, keep)

    def _fits(self, name: str) -> bool:
        member = self._space.members[name]
        return member.settings.branch == "inputs" and self._space.largest_rank(member) > 0

    def _collector(self, name: str, linear: nn.Linear, into: UnreadInputs) -> Callable[..., None]:
        """A hook that collects what the linear does not read at the start of the search."""
        member = self._space.members[name]
        norms = column_norms(linear.weight, member.settings.score)
        inputs = member.split(member.start).inputs

        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into.collect([args[0]], Selection(_threshold(args[0], norms, inputs), norms))

        return collect

    def _gather_one(self, name: str, linear: nn.Linear, unread: UnreadInputs | None) -> _Gathered:
        member, weight, dtype = self._space.members[name], linear.weight.float(), linear.weight.dtype
        norms, rank = column_norms(weight, member.settings.score), self._space.largest_rank(member)
        if not rank:
            return _Gathered(norms, None, None)
        if unread is None:
            v = largest_singular(weight, rank)[1]
            u = weight @ v
        else:
            try:
                v, u = unread.branch(weight, rank, dtype)
            except HessianError as unusable:
                raise RunError(f"{name}: {unusable} (of the inputs that are not read)") from None
        return _Gathered(norms, v.to(dtype), u.to(dtype))

    def _forward(self, name: str, linear: nn.Linear, x: Tensor) -> Tensor:
        """What the linear makes of `x` `[..., T, K]` by its budget; the first tokens of a window read everything, as
        when models are scored."""
        share, rank = self._splits[name]
        norms, v, u = self._gathered[name]
        first = self._dense_tokens if x.ndim == 3 else 0  # where windows are flattened, all tokens select
        least = torch.tensor([_threshold(x[..., first:, :], norms, share)], device=x.device)
        read = x.abs() > (least if norms is None else least / norms)
        read[..., :first, :] = True
        kept = torch.where(read, x, 0)
        y = nn.functional.linear(kept, linear.weight, linear.bias)
        return y if v is None or u is None or not rank else y + (x - kept) @ v[:, :rank] @ u[:, :rank].T


@contextmanager
def open_fitness(
    walker: BlockWalker,
    space: Space,
    stages: Mapping[str, StageConfig],
    calibration: Sequence[Tensor],
    windows: Sequence[Tensor],
    say: Callable[[str], None],
) -> Iterator[Fitness]:
    """The fitness on dev `windows` `[T]`, with branches from some of the `calibration` windows; the model's weights are
    in memory for the length of the `with`. `say` is told about every block."""
    few = first_windows(calibration, GATHERED)
    inputs, fitness = walker.embed(few), Fitness(walker, space, windows)
    with ExitStack() as held:
        blocks = [held.enter_context(walker.block(index)) for index in range(walker.n_blocks)]
        held.enter_context(walker.vocabulary())
        held.callback(fitness.close)
        say("the dense model's predictions")
        fitness.learn_dense()
        for index, block in enumerate(blocks):
            say(walker.block_prefix(index))
            fitness.gather(index, block, stages, inputs)
        yield fitness


def _threshold(x: Tensor, norms: Tensor | None, share: float) -> float:
    """The score that the `share` of inputs `x` `[..., K]` with the largest ones is above."""
    sketch = QuantileSketch()
    if x.numel():
        sketch.add(scores(spread_rows(x, _ROWS), norms))
    return sketch.quantile(1 - share)
