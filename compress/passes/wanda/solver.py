"""Wanda (Sun et al. 2023, arXiv 2306.11695, eq. 1): score = |W_ij| * ||X_j||_2; the weights stay as they are."""

from __future__ import annotations

from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..masks import pattern_mask
from .config import WandaConfig


def solve(weight: Tensor, statistics: InputStatistics, config: WandaConfig) -> PruneResult:
    """`weight` `[N, K]`, input mean squares `[K]` -> the same weights under Wanda's mask."""
    mask = pattern_mask(weight.abs() * statistics.mean_square.sqrt(), config)
    return PruneResult(weight.masked_fill(~mask, 0.0), mask)
