"""Small layers for solvers to work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfweight.compress.passes import PASSES, PruneResult, PruningConfig
from halfweight.compress.statistics import InputStatistics

CPU = torch.device("cpu")
ROWS, SIZE = 6, 24
PRUNERS = ["magnitude", "wanda", "sparsegpt", "admm"]
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {},
    "1:4": {"pattern": "1:4"},
    "4:8": {"pattern": "4:8"},
    "1:3": {"pattern": "1:3", "block_size": 6},
    "row": {"pattern": "unstructured", "density": 0.4},
    "layer": {"pattern": "unstructured", "density": 0.3, "scope": "layer"},
}


def configure(name: str, **settings: Any) -> PruningConfig:
    """The config of pass `name`; settings it does not have are left out."""
    config = PASSES[name].config
    return config(**{key: value for key, value in settings.items() if key in config.model_fields})


def solve(name: str, weight: Tensor, statistics: InputStatistics, **settings: Any) -> PruneResult:
    return PASSES[name].solve(weight, statistics, configure(name, **settings))


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


def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Minimiser of tr((V - weight) hessian (V - weight)^T) under `mask`, by each row's normal equations in float64."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    pull = weight.double() @ hessian.double()
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.solve(hessian.double()[kept][:, kept], pull[row, kept])
    return best
