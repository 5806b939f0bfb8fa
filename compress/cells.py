"""The cells of a sparsity sweep: which method, pattern and density, and how one linear is pruned for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..eval.sweep_report import Skipped
from ..serving.errors import InputError, did_you_mean
from ..serving.scheme import parse_group, parse_nm
from .passes import PASSES
from .passes.admm.config import ADMMConfig
from .passes.admm.solver import least_squares, tighten
from .passes.gqsa.masks import group_sums, spread_groups
from .passes.hessian import revive_dead_inputs
from .passes.magnitude.config import MagnitudeConfig
from .passes.masks import pattern_mask, top_mask
from .statistics import InputStatistics

CONTROLS = ("random", "erk-random")
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", *CONTROLS)
UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Cell:
    """Prune every decoder linear by `method` to the kept share `density` in `pattern` (unstructured, N:M, 1xG)."""

    method: str
    pattern: str
    density: float

    @property
    def needs_hessian(self) -> bool:
        return self.method in PASSES and PASSES[self.method].needs == "hessian"

    def __str__(self) -> str:
        return f"{self.method} {self.pattern} {self.density:g}"


def plan_cells(
    methods: Sequence[str], patterns: Sequence[str], densities: Sequence[float]
) -> tuple[list[Cell], list[Skipped]]:
    """Every combination, and those that do not exist with their reasons. N:M patterns bring their own density.

    Raises InputError for an unknown method or pattern, and a density outside of (0, 1).
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}{did_you_mean(method, list(METHODS))}")
    for density in densities:
        if not 0 < density < 1:
            raise InputError(f"density {density:g} is not between 0 and 1; give kept shares such as 0.9,0.7,0.5")
    cells, skipped = [], []
    for pattern in dict.fromkeys(map(known_pattern, patterns)):
        nm = parse_nm(pattern)
        for method in dict.fromkeys(methods):
            if method == "sparsegpt" and parse_group(pattern) is not None:
                reason = "SparseGPT prunes column by column and has no mask of whole groups; use admm"
                skipped.append(Skipped(method=method, pattern=pattern, reason=reason))
            elif method == "erk-random" and nm is not None:
                reason = "N:M gives every layer the same density"
                skipped.append(Skipped(method=method, pattern=pattern, reason=reason))
            else:
                own = [nm[0] / nm[1]] if nm is not None else sorted(set(densities), reverse=True)
                cells += [Cell(method, pattern, density) for density in own]
    if not cells:
        raise InputError("nothing to sweep: " + "; ".join(f"{s.method} {s.pattern}: {s.reason}" for s in skipped))
    return cells, skipped


def known_pattern(text: str) -> str:
    """`unstructured`, `N:M` or `1xG` (also written `groupG`) in the library's spelling; raises InputError otherwise."""
    pattern = f"1x{text[5:]}" if text.startswith("group") else text
    try:
        known = pattern == UNSTRUCTURED or parse_nm(pattern) is not None or parse_group(pattern) is not None
    except ValueError as error:
        raise InputError(str(error)) from None
    if not known:
        raise InputError(f"unknown pattern {text!r}; use {UNSTRUCTURED}, N:M such as 2:4, or group16")
    return pattern


def check_shapes(cells: Sequence[Cell], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError when a pattern does not fit one of the linears `shapes` (name -> `(N, K)`)."""
    for cell in cells:
        nm, group = parse_nm(cell.pattern), parse_group(cell.pattern)
        for name, (_, size) in shapes.items():
            if nm is not None and size % nm[1]:
                raise InputError(f"{cell.pattern}: {name} has {size} inputs, not a multiple of {nm[1]}; leave it out")
            if round(cell.density * (size if group is None else -(-size // group))) == 0:
                raise InputError(f"{cell}: keeps nothing of {name}'s {size} inputs; use a larger density")


def erk_densities(shapes: Mapping[str, tuple[int, int]], density: float) -> dict[str, float]:
    """Kept share of each linear `(N, K)` in proportion to (N + K) / (N K), with the overall share `density`.

    Erdos-Renyi (Mocanu et al. 2018, arXiv 1707.04780; for linears Evci et al.'s ERK, arXiv 1911.11134, is the same):
    small matrices keep more. A linear that would keep more than everything stays whole, and the others share the rest.
    """
    budget = density * sum(n * k for n, k in shapes.values())
    whole: set[str] = set()
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in whole}
        left = budget - sum(shapes[name][0] * shapes[name][1] for name in whole)
        scale = left / sum(n + k for n, k in rest.values())
        shares = {name: scale * (n + k) / (n * k) for name, (n, k) in rest.items()}
        over = {name for name, share in shares.items() if share > 1}
        if not over:
            return {name: shares.get(name, 1.0) for name in shapes}
        whole |= over


def prune(
    cell: Cell, weight: Tensor, statistics: InputStatistics, density: float, generator: torch.Generator
) -> Tensor:
    """`weight` `[N, K]` fp32 pruned as `cell` says to the kept share `density`; raises HessianError."""
    if density >= 1:
        return weight
    group = parse_group(cell.pattern)
    if group is not None:
        return _prune_groups(cell, weight, statistics, density, group, generator)
    settings = {"pattern": cell.pattern} if parse_nm(cell.pattern) else {"pattern": cell.pattern, "density": density}
    if cell.method in CONTROLS:
        mask = pattern_mask(_random_score(weight, generator), MagnitudeConfig.model_validate(settings))
        return weight.masked_fill(~mask, 0.0)
    solver = PASSES[cell.method]
    return solver.solve(weight, statistics, solver.config.model_validate(settings)).weight


def _prune_groups(
    cell: Cell, weight: Tensor, statistics: InputStatistics, density: float, group: int, generator: torch.Generator
) -> Tensor:
    """Keep the best groups of `group` inputs in each row, by the sum of their squared scores."""
    size = weight.shape[1]
    kept = round(density * -(-size // group))
    if cell.method == "admm":
        weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
        settings = ADMMConfig(pattern=UNSTRUCTURED, density=density)

        def choose(score: Tensor, step: int) -> Tensor:
            sums = group_sums(score.square(), group)
            return spread_groups(tighten(sums, top_mask(sums, kept), settings, step), group, size)

        return least_squares(weight, hessian, settings, choose)[0]
    score = {
        "magnitude": lambda: weight.square(),
        "wanda": lambda: weight.square() * statistics.mean_square,
    }.get(cell.method, lambda: _random_score(weight, generator))()
    mask = spread_groups(top_mask(group_sums(score, group), kept), group, size)
    return weight.masked_fill(~mask, 0.0)


def _random_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(weight.shape, generator=generator).to(weight.device)
