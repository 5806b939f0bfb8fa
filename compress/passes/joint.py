"""What GPTQ and GQSA share: the sweep in its order, then coordinate descent, then the result as the formats take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .base import PruneResult, SweepSettings
from .descent import descend
from .hessian import inverse_upper_factor
from .quantization import CodeRange, as_quantized, grid_values, spread_grid
from .sweep import Choose, Span, group_order, sweep

# From the factor of the inverse Hessian and the order it is in, a choice of masks for the sweep.
MakeChoose: TypeAlias = Callable[[Tensor, Tensor, list[Span]], Choose]


def sweep_and_descend(
    target: Tensor,
    start: Tensor,
    hessian: Tensor,
    settings: SweepSettings,
    *,
    inside_order: bool = True,
    choose: MakeChoose | None = None,
) -> PruneResult:
    """Codes whose outputs come closest to those of `target` `[N, K]`, found by a sweep over `start` `[N, K]` (fp32).

    `start` is `target`, or its least-squares approximation under the mask that `choose` will return. `hessian` `[K, K]`
    has a positive diagonal; it is used as scratch and restored. Without `inside_order` the columns of a group stay in
    place. The stats hold relative calibration errors: of `start` when it is not `target` (`error_pruned`), after the
    sweep (`error_swept`), and in the end (`error`). Raises HessianError.
    """
    allowed = CodeRange.of(settings.bits, settings.symmetric)
    outputs = settings.group_size if settings.along == "outputs" else None
    width = 1 if outputs else settings.group_size
    order, spans = group_order(hessian.diagonal(), width, settings.activation_order, inside_order)
    upper, damping = inverse_upper_factor(hessian[order[:, None], order], settings.damping)
    swept = sweep(
        start,
        upper,
        order,
        spans,
        codes=allowed,
        candidates=settings.candidates,
        block_size=settings.block_size,
        outputs=outputs,
        choose=None if choose is None else choose(upper, order, spans),
    )
    del upper
    stats, wanted = {"damping": damping}, output_power(target, hessian)
    if start is not target:
        stats["error_pruned"] = relative_loss(target, start, hessian, wanted)
    codes, mask, moved = swept.codes, swept.mask, float((swept.weight - target).square().sum())
    grid = swept.grid
    del swept, start  # the descent holds as many arrays again
    undamped = hessian.diagonal().clone()
    shift = damping * float(undamped.mean())
    hessian.diagonal().add_(shift)
    found = descend(
        target,
        hessian,
        codes,
        grid,
        None if choose is None else mask,
        allowed=allowed,
        group_size=settings.group_size,
        rounds=settings.descents,
        along_outputs=bool(outputs),
    )
    hessian.diagonal().copy_(undamped)
    codes = found.codes.T if outputs else found.codes
    values = grid_values(codes, spread_grid(found.grid, settings.group_size, codes.shape[1]))
    weight = values.T.contiguous() if outputs else values

    def undamped_error(power: float, distance: float) -> float:
        return max(0.0, power - shift * distance) / wanted if wanted else 0.0

    stats["error_swept"] = undamped_error(found.before, moved)
    stats["error"] = undamped_error(found.after, float((weight - target).square().sum()))
    return PruneResult(weight, mask, stats, as_quantized(codes, found.grid, allowed))


def relative_loss(target: Tensor, weight: Tensor, hessian: Tensor, wanted: float) -> float:
    """||x (weight - target)^T||^2 / ||x target^T||^2 on the calibration inputs; 0 when both are zero.

    `wanted` is the denominator, `output_power(target, hessian)`.
    """
    return output_power(weight - target, hessian) / wanted if wanted else 0.0


def output_power(weight: Tensor, hessian: Tensor) -> float:
    """||x weight^T||^2 for `weight` `[N, K]` on inputs x with `hessian` `[K, K]`."""
    return float(torch.vdot((weight @ hessian).flatten(), weight.flatten()))
