"""One linear from its statistics to what is stored for it, and to a module that computes as the stored tensors will.

One process solves, and tells the others what is stored; all of them replace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..serving.errors import RunError
from ..serving.linear import SelectingLinear
from ..serving.storage import effective_weight, pack_branch, pack_selection, pack_weight, selection_of
from ..triton_kernels.formats.integers import Quantized
from .memory import is_out_of_memory, release_memory
from .passes import PASSES, PruneResult, StageConfig, low_rank, selection
from .passes.hessian import HessianError
from .passes.joint import output_power
from .report import LayerReport
from .statistics import InputStatistics, relative_error, spread_rows
from .world import ALONE, World


class Solved(NamedTuple):
    """What a pass left of a linear: its stored tensors by suffix, and of the report its density and numbers."""

    packed: dict[str, Tensor]
    density: float
    stats: dict[str, float]

    @classmethod
    def nothing(cls) -> Solved:
        """In place of what another process has solved."""
        return cls({}, 0.0, {})

    def shared(self, world: World, source: int, device: torch.device) -> Solved:
        """What process `source` has."""
        packed = world.broadcast(self.packed, source, device)
        density, stats = world.shared((self.density, self.stats), source)
        return Solved(packed, density, stats)


_PARTS = 16  # into which a linear is cut, at most


def solve_linear(
    name: str, linear: nn.Linear, stage: StageConfig, stored: torch.dtype, statistics: InputStatistics
) -> Solved:
    """Solve one linear, which stays as it is; `stored` is the checkpoint's dtype.

    Raises RunError, naming the linear, when there is nothing to work with or the result is not finite.
    """
    statistics.require_usable(name)
    weight = linear.weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise RunError(f"{name}: its weights are not finite; check the checkpoint for damage")
    try:
        result = _solve_in_parts(name, weight, statistics, stage, stored)
    except HessianError as unusable:
        raise RunError(f"{name}: {unusable} (seen: {statistics.tokens} calibration tokens)") from None
    scheme = stage.scheme((weight.shape[0], weight.shape[1]))
    rounded = result.weight if result.quantized is not None else result.weight.to(stored)
    if not bool(torch.isfinite(rounded).all()):
        raise RunError(f"{name}: compressed weights are not finite in {stored}; raise damping, or keep the layer dense")
    packed = pack_weight(rounded, scheme, result.quantized, result.mask)
    if scheme.low_rank is not None and result.branch is not None:
        v, u, codes = result.branch
        packed |= pack_branch(scheme.low_rank, v.to(stored), u.to(stored), codes)
    return Solved(packed, float(result.mask.float().mean()), result.stats)


def replace_linear(
    name: str,
    linear: nn.Linear,
    stage: StageConfig,
    stored: torch.dtype,
    solved: Solved,
    seen: Sequence[Tensor],
    unseen: Sequence[Tensor],
    sensitivity: Tensor | None = None,
    world: World = ALONE,
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Make a linear what its tensors stand for, and choose what it reads, if it selects; all its tensors are returned.

    `seen` and `unseen` `[..., K]` are this process's share of its inputs on the calibration and on the dev set;
    `sensitivity` `[K]` says how much they move the block's output, where the stage selects by that. Raises RunError,
    naming the linear, when there is no branch for the inputs it does not read.
    """
    weight, packed, stats = linear.weight.float(), solved.packed, solved.stats
    shape = (weight.shape[0], weight.shape[1])
    scheme = stage.scheme(shape)
    linear.weight = nn.Parameter(effective_weight(scheme, packed, shape, linear.weight.dtype), requires_grad=False)
    if isinstance(linear, SelectingLinear):
        reading, read = _select(name, linear, stage, stored, seen, unseen, sensitivity, world)
        packed, stats = packed | reading, stats | read
    batches = world.total(len(unseen))
    rows = [spread_rows(x, max(1, 256 // batches)) for x in unseen]
    held_out = torch.cat(rows).float() if rows else weight.new_zeros(0, shape[1])
    if not world.total(len(held_out)):  # no token was routed to this expert: the error of its weights
        held_out = torch.eye(shape[1], device=weight.device)
    error = relative_error(selection.outputs(held_out, linear), held_out @ weight.T, world)
    layer = LayerReport(
        name=name,
        shape=shape,
        method=stage.name,
        pattern=scheme.pattern,
        numbers=scheme.numbers,
        density=solved.density,
        error=error,
        stats=stats,
    )
    return layer, packed


def _solve_in_parts(
    name: str, weight: Tensor, statistics: InputStatistics, stage: StageConfig, stored: torch.dtype
) -> PruneResult:
    """`low_rank.solve`; when memory runs out, again with fewer and fewer outputs at a time, where they are apart.

    Raises HessianError, and RunError when the smallest parts do not fit either.
    """
    parts, limit = 1, min(_PARTS, len(weight)) if _rows_apart(weight, stage) else 1
    while True:
        found = []
        try:
            for rows in weight.chunk(parts):
                found.append(low_rank.solve(PASSES[stage.name], rows, statistics, stage, stored))
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here has the error let go of what it was holding.
        found.clear()
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if parts == limit:
            apart = f", even {-(-len(weight) // parts)} of {len(weight)} outputs at a time" if parts > 1 else ""
            raise RunError(
                f"{name}: out of memory by {stage.name}{apart}; ignore it in the recipe, or use a machine or device"
                " with more memory, where the same command resumes"
            )
        parts = min(2 * parts, limit)
    return found[0] if parts == 1 else _joined(found, weight, statistics)


def _rows_apart(weight: Tensor, stage: StageConfig) -> bool:
    """Whether the outputs of a linear `[N, K]` can be solved apart: nothing stored or chosen is shared by them."""
    scheme = stage.scheme((weight.shape[0], weight.shape[1]))
    return scheme.rows_apart and scheme.low_rank is None and getattr(stage, "scope", "row") == "row"


def _joined(parts: Sequence[PruneResult], weight: Tensor, statistics: InputStatistics) -> PruneResult:
    """The result for `weight` `[N, K]` from those of its rows, in order; `parts` in the stats is their number."""
    first = parts[0]
    quantized = None
    if coded := [part.quantized for part in parts if part.quantized is not None]:
        codes, scales = torch.cat([part.codes for part in coded]), torch.cat([part.scales for part in coded])
        zeros = [part.zeros for part in coded if part.zeros is not None]
        quantized = Quantized(codes, scales, torch.cat(zeros) if zeros else None)
    stats: dict[str, float] = {"parts": len(parts)}
    for key in first.stats:
        values = [part.stats[key] for part in parts]
        if key.startswith("error"):  # relative, so each counts by its rows' share of the outputs
            shares = [output_power(rows, statistics.hessian) for rows in weight.chunk(len(parts))]
            stats[key] = sum(v * s for v, s in zip(values, shares, strict=True)) / (sum(shares) or 1.0)
        else:
            stats[key] = sum(values) if key.endswith("loss") else max(values)
    mask = torch.cat([part.mask for part in parts])
    return PruneResult(torch.cat([part.weight for part in parts]), mask, stats, quantized)


def _select(
    name: str,
    linear: SelectingLinear,
    stage: StageConfig,
    stored: torch.dtype,
    seen: Sequence[Tensor],
    unseen: Sequence[Tensor],
    sensitivity: Tensor | None,
    world: World,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Give a solved linear what it reads its inputs by; returns what is stored for that, and what it reads."""
    settings, shape = stage.selection, (linear.out_features, linear.in_features)
    scheme = stage.scheme(shape)
    assert settings is not None  # or it would not be such a linear
    try:
        chosen = selection.choose(linear.weight.float(), seen, settings, scheme, stored, sensitivity, world)
    except HessianError as unusable:
        raise RunError(f"{name}: {unusable} (of the inputs that are not read)") from None
    packed = world.broadcast(pack_selection(scheme, chosen), 0, linear.weight.device)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in packed.values()):
        raise RunError(f"{name}: its branch is not finite in {stored}; set selection.channels to 1, or ignore it")
    packed = {suffix: tensor.to(linear.weight.device) for suffix, tensor in packed.items()}
    linear.selection = selection_of(scheme, packed)
    read = {"inputs_read": selection.read_share(unseen, linear, world), "channels": settings.channels}
    if settings.truncation is None:
        read |= {"inputs_wanted": settings.split(shape, scheme).inputs, "sparsity": settings.sparsity}
    return packed, read
