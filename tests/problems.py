"""Small layers for solvers to work on."""

from __future__ import annotations

import torch
from torch import Tensor

from halfweight.compress.statistics import InputStatistics


def statistics_of(x: Tensor) -> InputStatistics:
    """What calibration would measure about inputs `x` `[tokens, K]`."""
    statistics = InputStatistics(x.shape[-1], hessian=True, device=torch.device("cpu"))
    statistics.add(x)
    return statistics


def problem(seed: int, tokens: int = 200, size: int = 24, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Weight `[rows, size]` and correlated inputs `[tokens, size]` whose scales differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    scales = torch.randn(size, generator=generator).exp()
    x = torch.randn(tokens, size, generator=generator) @ mixing * scales
    return torch.randn(rows, size, generator=generator), x


def output_error(x: Tensor, weight: Tensor, compressed: Tensor) -> float:
    """||x (W' - W)^T||^2 in fp64."""
    return float((x.double() @ (compressed - weight).double().T).square().sum())
