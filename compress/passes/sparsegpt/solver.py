"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1), with an order and a finish.

Columns are visited one by one. With U the upper Cholesky factor of the inverse Hessian, pruning weight w in column i
costs (w / U_ii)^2 and its error w / U_ii, spread over the columns ahead along U's row i, is the optimal correction.

The paper goes left to right; here N:M groups with the largest inputs go first, while most columns can still make up for
them (as GPTQ's activation order). And a column the sweep has passed never learns of what is pruned after it, so in the
end conjugate gradients move all kept weights towards the least squares of their mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...statistics import InputStatistics
from ..base import PruneResult
from ..hessian import inverse_upper_factor, revive_dead_inputs
from ..least_squares import refit
from ..masks import nm_mask, top_mask
from ..sweep import group_order
from .config import SparseGPTConfig


def solve(weight: Tensor, statistics: InputStatistics, config: SparseGPTConfig) -> PruneResult:
    """`weight` `[N, K]` fp32 and the input Hessian `[K, K]` -> updated weights under the chosen mask.

    Raises HessianError when no damping makes the Hessian positive definite.
    """
    weight, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
    # An unstructured mask is chosen block by block with one density for all, so a block should not hold like columns.
    order, _ = group_order(hessian.diagonal(), config.nm[1] if config.nm else 1, sort=config.nm is not None)
    hessian = hessian[order[:, None], order]
    upper, damping = inverse_upper_factor(hessian, config.damping)
    del hessian
    columns, kept, loss = _sweep(weight.T[order], upper, config)
    del upper
    back = order.argsort()
    mask = kept[back].T.contiguous()
    pruned = columns[back].T.masked_fill(~mask, 0.0)
    del columns, kept
    if config.refine:
        _, hessian, _ = revive_dead_inputs(weight, statistics.hessian)
        pruned = refit(pruned, weight, hessian, mask, damping, config.refine)
    return PruneResult(pruned, mask, {"damping": damping, "obs_loss": loss})


def _sweep(columns: Tensor, upper: Tensor, config: SparseGPTConfig) -> tuple[Tensor, Tensor, float]:
    """Pruned `columns` and bool mask `[K, N]`, and the loss, from weights `[K, N]` and `upper` `[K, K]` in one order.

    Columns are rows here, so that each step works on contiguous memory; `columns` is changed in place.
    """
    scale, size = upper.diagonal(), len(columns)
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
    return columns, kept, loss


def _unstructured(score: Tensor, config: SparseGPTConfig, start: int, stop: int, size: int) -> Tensor:
    """Mask `[stop - start, N]` for one block; counts are rounded cumulatively so that the whole layer's is exact."""
    if config.scope == "row":
        return top_mask(score.T, round(config.kept * stop) - round(config.kept * start)).T
    rows = score.shape[1]
    count = round(config.kept * stop * rows) - round(config.kept * start * rows)
    return top_mask(score.T.reshape(1, -1), count).view(rows, -1).T
