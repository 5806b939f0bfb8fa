"""Quantiles of a stream in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .world import World

_DROPPED = 15  # low bits of a float's pattern: 2^16 bins, each 2^-8 of its numbers wide


class QuantileSketch:
    """A histogram of non-negative numbers whose bins follow the bits of fp32.

    Bins get narrower towards zero just as floats do, so that no range has to be known beforehand; counts are exact and
    sketches of parts of a stream add up, whatever their order.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - _DROPPED), dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count `values`, finite and >= 0, of any shape."""
        bins = values.float().contiguous().view(torch.int32).flatten() >> _DROPPED
        self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu()

    def share(self, world: World) -> None:
        """Take in what the other processes have added to theirs; nothing is to be added afterwards."""
        self.counts = world.sum(self.counts)

    def quantile(self, share: float) -> float:
        """A number that about `share` (0 to 1) of the values do not exceed; 0 when nothing was added.

        Off by less than the values in one bin, which are taken to be spread evenly over it.
        """
        below = self.counts.cumsum(0)
        wanted = share * float(below[-1])
        index = int(torch.searchsorted(below, max(1, round(wanted))))
        if index == len(below):
            return 0.0
        inside = int(self.counts[index])
        place = (wanted - float(below[index] - inside)) / inside
        low, high = (torch.tensor(i << _DROPPED, dtype=torch.int32).view(torch.float32) for i in (index, index + 1))
        return float(torch.lerp(low, high, min(max(place, 0.0), 1.0)))
