"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) with searched ranges, then coordinate descent.

Ranges are found when the sweep reaches a group, on weights that already carry the corrections of the columns before.
Activation order sorts whole groups and columns inside them, so that groups stay consecutive in storage.
"""

from __future__ import annotations

from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..hessian import revive_dead_inputs
from ..joint import sweep_and_descend
from .config import GPTQConfig


def solve(weight: Tensor, statistics: InputStatistics, config: GPTQConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 and the input Hessian `[K, K]` -> codes, and the weights they stand for.

    Raises HessianError when no damping makes the Hessian positive definite.
    """
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    return sweep_and_descend(weight, weight, hessian, config)
