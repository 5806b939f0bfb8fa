"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

Columns are visited left to right. With U the upper Cholesky factor of the inverse Hessian, pruning weight w in column i
costs (w / U_ii)^2 and its error w / U_ii, spread over the columns ahead along U's row i, is the optimal correction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..hessian import inverse_upper_factor, revive_dead_inputs
from ..masks import nm_mask, top_mask
from .config import SparseGPTConfig


def solve(weight: Tensor, statistics: InputStatistics, config: SparseGPTConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 and the input Hessian `[K, K]` -> updated weights under the chosen mask.

    Raises HessianError when no damping makes the Hessian positive definite.
    """
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    upper, damping = inverse_upper_factor(hessian, config.damping)
    del hessian
    scale = upper.diagonal()
    # Columns are rows here, so that each step of the sweep works on contiguous memory.
    columns = weight.T.contiguous()
    size = len(columns)
    kept = torch.ones_like(columns, dtype=torch.bool)
    loss = 0.0
    for start in range(0, size, config.block_size):
        stop = min(start + config.block_size, size)
        block, errors = columns[start:stop].clone(), torch.empty_like(columns[start:stop])
        if config.nm is None:
            score = (block / scale[start:stop, None]).square()
            kept[start:stop] = _unstructured(score, config, start, stop, size)
        for i in range(stop - start):
            column = start + i
            if config.nm is not None and column % config.nm[1] == 0:
                group = slice(i, i + config.nm[1])
                score = (block[group] / scale[column : column + config.nm[1], None]).square()
                kept[column : column + config.nm[1]] = nm_mask(score.T, *config.nm).T
            error = block[i].masked_fill(kept[column], 0.0) / scale[column]
            block[i].masked_fill_(~kept[column], 0.0)
            block[i + 1 :].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[i] = error
        columns[start:stop] = block
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += float(errors.square().sum()) / 2
    mask = kept.T.contiguous()
    return PruneResult(columns.T.masked_fill(~mask, 0.0), mask, {"damping": damping, "obs_loss": loss})


def _unstructured(score: Tensor, config: SparseGPTConfig, start: int, stop: int, size: int) -> Tensor:
    """Mask `[stop - start, N]` for one block; counts are rounded cumulatively so that the whole layer's is exact."""
    if config.scope == "row":
        return top_mask(score.T, round(config.kept * stop) - round(config.kept * start)).T
    rows = score.shape[1]
    count = round(config.kept * stop * rows) - round(config.kept * start * rows)
    return top_mask(score.T.reshape(1, -1), count).view(rows, -1).T
