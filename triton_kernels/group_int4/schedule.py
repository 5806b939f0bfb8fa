"""Who computes which rows of groups balanced over a layer: decided once, as the sparsity never changes."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 16
MOST_WORKERS = 528  # four programs on each multiprocessor of the largest GPUs
ALLOWED_IMBALANCE = 1.05


class Schedule(NamedTuple):
    """int32: `order[tiles * 16]`, rows by place, -1 for none; `unit_start[tiles + 1]`; `worker_start[workers + 1]`."""

    order: Tensor
    unit_start: Tensor
    worker_start: Tensor

    @property
    def imbalance(self) -> float:
        """Units of the busiest worker over the mean."""
        loads = self.unit_start.long()[self.worker_start.long()].diff()
        return float(loads.max() / loads.double().mean()) if int(loads.sum()) else 1.0


def schedule(counts: Tensor, unit_sets: int) -> Schedule:
    """Tiles of 16 rows with similar `counts[N]` of groups, and tiles to workers by longest processing time first.

    The more workers, the more run at once; fewer workers share more evenly. The most workers that are within
    `ALLOWED_IMBALANCE` win, or else the evenest.
    """
    rows = counts.argsort(descending=True, stable=True)
    tiles = -(-len(rows) // ROWS)
    places = torch.full((tiles * ROWS,), -1, dtype=torch.int64)
    places[: len(rows)] = rows
    units = [-(-int(counts[row]) // unit_sets) for row in places[::ROWS].tolist()]  # a tile's first row is its longest
    owned = _most_that_are_even(units)
    order = [tile for own in owned for tile in own]
    unit_start = torch.tensor([0, *(units[tile] for tile in order)]).cumsum(0)
    worker_start = torch.tensor([0, *map(len, owned)]).cumsum(0)
    return Schedule(places.view(-1, ROWS)[order].flatten().int(), unit_start.int(), worker_start.int())


def _most_that_are_even(units: list[int]) -> list[list[int]]:
    """The tiles of each worker."""
    workers = max(1, min(len(units), MOST_WORKERS))
    best, evenest = _assign(units, workers)
    while workers > 1 and evenest > ALLOWED_IMBALANCE:
        workers = min(workers - 1, int(0.97 * workers))
        owned, imbalance = _assign(units, workers)
        if imbalance < evenest:
            best, evenest = owned, imbalance
    return best


def _assign(units: list[int], workers: int) -> tuple[list[list[int]], float]:
    """Give each tile, longest first, to the worker with the least to do; also returns the busiest over the mean."""
    heap = [(0, worker) for worker in range(workers)]
    owned: list[list[int]] = [[] for _ in range(workers)]
    for tile, size in enumerate(units):
        load, worker = heap[0]
        owned[worker].append(tile)
        heapq.heapreplace(heap, (load + size, worker))
    return owned, max(heap)[0] * workers / max(1, sum(units))
