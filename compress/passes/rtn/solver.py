"""Round to nearest, with a search for each group's range that minimises the weights' squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..quantization import CodeRange, quantize
from .config import RTNConfig


def solve(weight: Tensor, statistics: InputStatistics, config: RTNConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 -> its rounding; `statistics` are not read."""
    allowed = CodeRange.of(config.bits, config.symmetric)
    rows = weight.T.contiguous() if config.along == "outputs" else weight
    quantized, values = quantize(rows, None, allowed, config.group_size, config.candidates)
    values = values.T.contiguous() if config.along == "outputs" else values
    return PruneResult(values, torch.ones_like(weight, dtype=torch.bool), quantized=quantized)
