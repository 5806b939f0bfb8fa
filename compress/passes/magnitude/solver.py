"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): score = |W|."""

from __future__ import annotations

from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..masks import pattern_mask
from .config import MagnitudeConfig


def solve(weight: Tensor, statistics: InputStatistics, config: MagnitudeConfig) -> PruneResult:
    """`weight` `[N, K]` -> the same weights under the mask of the largest; `statistics` are not read."""
    mask = pattern_mask(weight.abs(), config)
    return PruneResult(weight.masked_fill(~mask, 0.0), mask)
