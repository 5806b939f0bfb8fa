"""One linear from its statistics to what is stored for it, and to a module that computes as the stored tensors will."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..serving.errors import RunError
from ..serving.linear import SelectingLinear
from ..serving.storage import effective_weight, pack_branch, pack_selection, pack_weight, selection_of
from .passes import PASSES, StageConfig, low_rank, selection
from .passes.hessian import HessianError
from .report import LayerReport
from .statistics import InputStatistics, relative_error, spread_rows


def solve_linear(
    name: str,
    linear: nn.Linear,
    stage: StageConfig,
    stored: torch.dtype,
    statistics: InputStatistics,
    seen: Sequence[Tensor],
    unseen: Sequence[Tensor],
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Solve one linear and make it what its tensors, also returned, stand for; `stored` is the checkpoint's dtype.

    `seen` and `unseen` `[..., K]` are its inputs on the calibration and on the dev set. Raises RunError, naming the
    linear, when there is nothing to work with or the result is not finite.
    """
    statistics.require_usable(name)
    weight = linear.weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise RunError(f"{name}: its weights are not finite; check the checkpoint for damage")
    try:
        result = low_rank.solve(PASSES[stage.name], weight, statistics, stage, stored)
    except HessianError as unusable:
        raise RunError(f"{name}: {unusable} (seen: {statistics.tokens} calibration tokens)") from None
    shape = (weight.shape[0], weight.shape[1])
    scheme = stage.scheme(shape)
    rounded = result.weight if result.quantized is not None else result.weight.to(stored)
    if not bool(torch.isfinite(rounded).all()):
        raise RunError(f"{name}: compressed weights are not finite in {stored}; raise damping, or keep the layer dense")
    packed = pack_weight(rounded, scheme, result.quantized, result.mask)
    if scheme.low_rank is not None and result.branch is not None:
        v, u, codes = result.branch
        packed |= pack_branch(scheme.low_rank, v.to(stored), u.to(stored), codes)
    rounded = effective_weight(scheme, packed, shape, linear.weight.dtype)
    linear.weight = nn.Parameter(rounded, requires_grad=False)
    stats = result.stats
    if isinstance(linear, SelectingLinear):
        reading, read = _select(name, linear, stage, stored, seen, unseen)
        packed, stats = packed | reading, stats | read
    held_out = torch.cat([spread_rows(x, 256 // len(unseen)) for x in unseen]).float()
    error = relative_error(selection.outputs(held_out, linear), held_out @ weight.T)
    layer = LayerReport(
        name=name,
        shape=shape,
        method=stage.name,
        pattern=scheme.pattern,
        numbers=scheme.numbers,
        density=float(result.mask.float().mean()),
        error=error,
        stats=stats,
    )
    return layer, packed


def _select(
    name: str,
    linear: SelectingLinear,
    stage: StageConfig,
    stored: torch.dtype,
    seen: Sequence[Tensor],
    unseen: Sequence[Tensor],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Give a solved linear what it reads its inputs by; returns what is stored for that, and what it reads."""
    settings, shape = stage.selection, (linear.out_features, linear.in_features)
    scheme = stage.scheme(shape)
    assert settings is not None  # or it would not be such a linear
    try:
        packed = pack_selection(scheme, selection.choose(linear.weight.float(), seen, settings, scheme, stored))
    except HessianError as unusable:
        raise RunError(f"{name}: {unusable} (of the inputs that are not read)") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in packed.values()):
        raise RunError(f"{name}: its branch is not finite in {stored}; set selection.channels to 1, or ignore it")
    packed = {suffix: tensor.to(linear.weight.device) for suffix, tensor in packed.items()}
    linear.selection = selection_of(scheme, packed)
    read = {
        "inputs_read": selection.read_share(unseen, linear),
        "inputs_wanted": settings.split(shape, scheme).inputs,
    }
    return packed, read
