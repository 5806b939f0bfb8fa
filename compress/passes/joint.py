"""What GPTQ and GQSA share: the sweep in its order, then coordinate descent, then the result as the formats take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

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
    upper, damping = inverse_upper_factor(hessian[order][:, order], settings.damping)
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
    stats = {"damping": damping}
    if start is not target:
        stats["error_pruned"] = relative_loss(target, start, hessian)
    stats["error_swept"] = relative_loss(target, swept.weight, hessian)
    undamped = hessian.diagonal().clone()
    hessian.diagonal().add_(damping * undamped.mean())
    codes, grid = descend(
        target,
        hessian,
        swept.codes,
        swept.grid,
        None if choose is None else swept.mask,
        allowed=allowed,
        group_size=settings.group_size,
        rounds=settings.descents,
        along_outputs=bool(outputs),
    )
    hessian.diagonal().copy_(undamped)
    codes = codes.T if outputs else codes
    values = grid_values(codes, spread_grid(grid, settings.group_size, codes.shape[1]))
    weight = values.T.contiguous() if outputs else values
    stats["error"] = relative_loss(target, weight, hessian)
    return PruneResult(weight, swept.mask, stats, as_quantized(codes, grid, allowed))


def relative_loss(target: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """||x (weight - target)^T||^2 / ||x target^T||^2 on the calibration inputs; 0 when both are zero."""
    wanted, delta = float(((target @ hessian) * target).sum()), weight - target
    return float(((delta @ hessian) * delta).sum()) / wanted if wanted else 0.0
