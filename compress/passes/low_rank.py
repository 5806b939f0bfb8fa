"""A low-rank branch that makes up for what a pass did to a linear (SLiM, Mozaffari et al. 2024, arXiv 2410.09615).

With H = L L^T the inputs' Hessian, the branch `U V^T` that costs least is the truncated SVD of (W - W') L, times L^-1.
V takes the singular values, so that U's columns are alike, V is rounded first, and U is the least squares for V as it
is stored. Then the pass works once more, on what the branch leaves of W, and U is fitted to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...serving.scheme import IntegerScheme
from ...triton_kernels.formats.integers import Quantized
from ..statistics import InputStatistics
from .base import Branch, Pass, PruneResult, StageConfig
from .hessian import damped_cholesky, revive_dead_inputs
from .joint import output_power, relative_loss
from .quantization import CodeRange, quantize

_DAMPING = 0.01
_CANDIDATES = 20
_OVERSAMPLED, _ROUNDS = 16, 4  # of the subspace iteration


def solve(
    method: Pass[StageConfig], weight: Tensor, statistics: InputStatistics, config: StageConfig, dtype: torch.dtype
) -> PruneResult:
    """`method.solve(weight [N, K] fp32, statistics, config)`, with the branch that `config.low_rank` asks for.

    A branch without integers is rounded to `dtype`; it needs the statistics' Hessian. The stats then hold the relative
    calibration errors before there was a branch (`error_without_branch`) and in the end (`error`). Raises HessianError.
    """
    alone = method.solve(weight, statistics, config)
    if config.low_rank is None:
        return alone
    scheme = config.low_rank.scheme((weight.shape[0], weight.shape[1]))
    inner, outer = (None, None) if scheme.parts is None else (part.integers for part in scheme.parts)
    target, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    rows, v_codes = _rounded(input_directions(target - alone.weight, hessian, scheme.rank).T, inner, dtype)
    v = rows.T
    u, _ = _rounded(fit_outputs(target - alone.weight, hessian, v), outer, dtype)
    result = method.solve(target - u @ v.T, statistics, config)
    u, u_codes = _rounded(fit_outputs(target - result.weight, hessian, v), outer, dtype)
    stats = {name: value for name, value in result.stats.items() if not name.startswith("error")}
    wanted = output_power(target, hessian)
    stats["error_without_branch"] = relative_loss(target, alone.weight, hessian, wanted)
    stats["error"] = relative_loss(target, result.weight + u @ v.T, hessian, wanted)
    codes = None if v_codes is None or u_codes is None else (v_codes, u_codes)
    return PruneResult(result.weight, result.mask, stats, result.quantized, Branch(v, u, codes))


def input_directions(residual: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """`V` `[K, rank]` of the `U V^T` that loses least of `residual` `[N, K]` on inputs with `hessian` `[K, K]`.

    Scaled so that U's columns have a mean square of 1. Raises HessianError.
    """
    factor, _ = damped_cholesky(hessian, _DAMPING)
    values, right = largest_singular(residual @ factor, rank)
    scaled = right * (values / residual.shape[0] ** 0.5)
    return torch.linalg.solve_triangular(factor.T, scaled, upper=True)


def fit_outputs(residual: Tensor, hessian: Tensor, v: Tensor) -> Tensor:
    """The least-squares `U` `[N, rank]` for `U V^T` to be `residual` `[N, K]` on inputs with `hessian` `[K, K]`."""
    seen = hessian @ v
    factor, _ = damped_cholesky(v.T @ seen, 1e-6)
    return torch.cholesky_solve((residual @ seen).T, factor).T.contiguous()


def largest_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest singular values of `matrix` `[N, K]` and their right vectors `[K, rank]`, by subspace
    iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4): a full SVD would take many times longer."""
    size = min(rank + _OVERSAMPLED, *matrix.shape)
    start = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0))
    basis = start.to(matrix.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ basis)[0]
        basis = torch.linalg.qr(matrix.T @ basis)[0]
    _, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return values[:rank], (basis @ right.T)[:, :rank]


def _rounded(rows: Tensor, integers: IntegerScheme | None, dtype: torch.dtype) -> tuple[Tensor, Quantized | None]:
    """`rows` `[R, C]` as they are stored, in fp32, and with integers their codes."""
    if integers is None:
        return rows.to(dtype).float(), None
    allowed = CodeRange.of(integers.bits, integers.symmetric)
    codes, values = quantize(rows.contiguous(), None, allowed, integers.group_size, _CANDIDATES)
    return values, codes
