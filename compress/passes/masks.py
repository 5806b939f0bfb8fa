"""Masks from scores: which weights a pattern keeps. Ties keep the lower index, so results are deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PruningConfig


def pattern_mask(score: Tensor, config: PruningConfig) -> Tensor:
    """Bool mask `[N, K]` of the weights to keep: the highest `score` `[N, K]` that the config's pattern allows."""
    if config.nm is not None:
        return nm_mask(score, *config.nm)
    if config.scope == "row":
        return top_mask(score, round(config.kept * score.shape[1]))
    return top_mask(score.reshape(1, -1), round(config.kept * score.numel())).view_as(score)


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row. `score` `[N, K]`, K divisible by `m`."""
    groups = score.unflatten(-1, (-1, m))
    # Rank by pairwise comparison: m elementwise steps, instead of sorting millions of tiny groups.
    rank = torch.zeros_like(groups, dtype=torch.int16)
    index = torch.arange(m, device=score.device)
    for other in range(m):
        column = groups[..., other : other + 1]
        rank += (column > groups) | ((column == groups) & (other < index))
    return (rank < n).flatten(-2)


def top_mask(score: Tensor, count: int) -> Tensor:
    """Keep exactly the `count` highest scores of each row of `score` `[N, K]`."""
    order = score.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
