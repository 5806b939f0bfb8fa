"""Input selection: which inputs a token reads, and the branch for those it does not.

One threshold per linear on |x| is TEAL (Liu et al. 2024, arXiv 2408.14690); on |x| times the norm of the input's
weights, WINA (Chen et al. 2025, arXiv 2505.19427) and the code of R-Sparse (Zhang et al. 2025, arXiv 2504.19449). The
branch is R-Sparse's: the inputs that are not read pass through a low-rank approximation of the weight. Its published
form is the truncated SVD of the weight; fitted to `inputs` it is the one that loses least on what calibration leaves.

At a given sparsity of a linear, CETT (Sparsing Law, Luo et al. 2024, arXiv 2411.02335) reads what the L2 norm reads:
its score is the size |x_i| * ||W[:, i]|| of a neuron's output, for an FFN's last linear. What differs is that linears
get thresholds of the same truncation error instead of the same sparsity; `truncation` is that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...eval.metrics import cett
from ...serving.errors import InputError
from ...serving.linear import SelectingLinear
from ...serving.scheme import LinearScheme
from ...serving.storage import Selection
from ...triton_kernels.input_select import reference
from ..quantiles import QuantileSketch
from ..statistics import add_grams, mirror_upper, spread_rows
from ..world import ALONE, World
from .base import SelectionSettings
from .low_rank import fit_outputs, input_directions, largest_singular

_TRUNCATED = 512  # tokens that truncation errors are measured on
_BISECTIONS = 14  # of the share of inputs that is left out


def choose(
    weight: Tensor,
    inputs: Sequence[Tensor],
    settings: SelectionSettings,
    scheme: LinearScheme,
    dtype: torch.dtype,
    sensitivity: Tensor | None = None,
    world: World = ALONE,
) -> Selection:
    """What a linear with `weight` `[N, K]` fp32 and calibration `inputs` `[..., K]` reads by, as `settings` say.

    The `inputs` are this process's share of them; a bound on truncation is met on the share of the process that leads.
    The branch is rounded to `dtype`. `sensitivity` `[K]`, of `input_sensitivities`, is what `score: gradient` weighs
    by. Raises InputError where it is missing, HessianError where the inputs that are not read determine no branch.
    """
    norms = column_norms(weight, settings.score, sensitivity)
    if settings.truncation is not None:
        assert norms is not None  # such settings score by l2
        return Selection(truncation_threshold(weight, inputs, norms, settings.truncation), norms)
    sketch = QuantileSketch()
    for x in inputs:
        sketch.add(scores(x, norms))
    sketch.share(world)
    selection = threshold_of(sketch, norms, settings, scheme, (weight.shape[0], weight.shape[1]))
    if scheme.low_rank is None:
        return selection
    v, u = _branch(weight, inputs, selection, settings, scheme.low_rank.rank, dtype, world)
    return selection._replace(v=v.to(dtype), u=u.to(dtype))


def threshold_of(
    sketch: QuantileSketch,
    norms: Tensor | None,
    settings: SelectionSettings,
    scheme: LinearScheme,
    shape: tuple[int, int],
) -> Selection:
    """The selection without a branch that reads, of inputs with the scores in `sketch`, the share `settings` allow."""
    if settings.threshold != "fixed":
        return Selection(None, norms, inputs=max(1, round(settings.split(shape, scheme).inputs * shape[1])))
    return Selection(sketch.quantile(1 - settings.split(shape, scheme).inputs), norms)


def scores(x: Tensor, norms: Tensor | None) -> Tensor:
    """What is compared with the threshold, fp32 like `x` `[..., K]`."""
    size = x.float().abs()
    return size if norms is None else size * norms


def column_norms(weight: Tensor, score: str, sensitivity: Tensor | None = None) -> Tensor | None:
    """What `score` multiplies |x| with, fp32 `[K]`, scaled to a mean of 1; None for `size`.

    The norm of each input's weights, or for `gradient` its `sensitivity`; InputError where that was not collected.
    """
    if score == "size":
        return None
    if score != "gradient":
        norms = torch.linalg.vector_norm(weight.float(), ord={"l1": 1, "l2": 2}[score], dim=0)
    elif sensitivity is None:
        raise InputError("score: gradient needs gradients, which were not collected here; use l2, or `compress`")
    else:
        norms = sensitivity.float()
    return norms / norms.mean().clamp_min(torch.finfo(torch.float32).tiny)


def truncation_threshold(weight: Tensor, inputs: Sequence[Tensor], norms: Tensor, target: float) -> float:
    """The largest threshold on |x| * norms whose CETT (`eval.metrics.cett`) is at most `target`, by bisection.

    `norms` `[K]` are those of the columns of `weight` `[N, K]`, up to a factor. Errors are measured on some tokens of
    every one of the `inputs` `[..., K]`.
    """
    x = torch.cat([spread_rows(part, -(-_TRUNCATED // len(inputs))) for part in inputs]).float()
    sketch = QuantileSketch()
    sketch.add(scores(x, norms))
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        error, _ = cett(x, weight, sketch.quantile(middle), norms)
        low, high = (middle, high) if error <= target else (low, middle)
    return sketch.quantile(low) if low else 0.0


def outputs(x: Tensor, linear: nn.Linear) -> Tensor:
    """What `linear` makes of fp32 `x` `[tokens, K]`, its bias aside, computed in fp32."""
    weight = linear.weight.float().T
    chosen = linear.selection if isinstance(linear, SelectingLinear) else None
    return x @ weight if chosen is None else reference.linear(x, weight, chosen)


def read_share(inputs: Sequence[Tensor], linear: SelectingLinear, world: World = ALONE) -> float:
    """The share of its `inputs` `[..., K]`, those of all processes, that a linear with a selection reads."""
    assert linear.selection is not None  # the caller has just chosen it
    chosen = seen = 0
    for x in inputs:
        read = reference.selected(x.reshape(-1, x.shape[-1]), linear.selection, 0)
        chosen, seen = chosen + int(read.sum()), seen + read.numel()
    return world.total(chosen) / world.total(seen)


def _branch(
    weight: Tensor,
    inputs: Sequence[Tensor],
    selection: Selection,
    settings: SelectionSettings,
    rank: int,
    dtype: torch.dtype,
    world: World,
) -> tuple[Tensor, Tensor]:
    """`V` `[K, rank]` and `U` `[N, rank]`, so that `V U^T` stands for `weight^T`."""
    if settings.branch == "weight":
        _, right = largest_singular(weight, rank)
        return right, weight @ right
    unread = UnreadInputs(weight)
    unread.collect(inputs, selection, world)
    return unread.branch(weight, rank, dtype)


class UnreadInputs:
    """Second moments of what a linear does not read of its inputs, for the branch fitted to them."""

    def __init__(self, weight: Tensor) -> None:
        self._total = weight.new_zeros((weight.shape[1],) * 2, dtype=torch.float32)
        self._tokens = 0

    def collect(self, inputs: Sequence[Tensor], selection: Selection, world: World = ALONE) -> None:
        """Accumulate what `selection` leaves out of `inputs` `[..., K]`, those of all processes."""

        def unread() -> Iterator[Tensor]:
            for x in inputs:
                x = x.reshape(-1, x.shape[-1])
                yield x.masked_fill(_read(scores(x, selection.norms), selection), 0)

        add_grams(self._total, unread, world)
        self._tokens += world.total(sum(x.numel() // x.shape[-1] for x in inputs))

    def branch(self, weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`V` `[K, rank]`, rounded to `dtype`, and `U` `[N, rank]`, both fp32, for `weight` `[N, K]` fp32, the
        directions that matter most first. Raises HessianError."""
        hessian = mirror_upper(self._total).div_(max(1, self._tokens))
        if not bool(hessian.any()):  # nothing but zeros is left out, as after a ReLU
            return weight.new_zeros(weight.shape[1], rank), weight.new_zeros(weight.shape[0], rank)
        v = input_directions(weight, hessian, rank).to(dtype).float()
        return v, fit_outputs(weight, hessian, v)


def _read(score: Tensor, selection: Selection) -> Tensor:
    """bool `[tokens, K]`: which inputs with this `score` `[tokens, K]` are read."""
    if selection.inputs is not None:
        return score > reference.token_cuts(score, selection.inputs)
    assert selection.threshold is not None  # it has this or a number of inputs
    return score > selection.threshold
