"""How a launch walks K, and the room that its lists and sums take: pure functions of a linear's size."""

from __future__ import annotations

from typing import NamedTuple

from ..input_select.split import partial_sizes


class Regions(NamedTuple):
    """Sizes, in fp32 numbers, of what shares the workspace: see `Lists`."""

    z: int
    rows: int
    counts: int
    values: int
    partial: int

    @property
    def total(self) -> int:
        return sum(self)


def chunk_size(k: int, tiles: int) -> int:
    """Inputs of a chunk: 4096, halved until there are enough programs for a GPU, down to 256."""
    chunk = 4096
    while chunk > 256 and (tiles * -(-k // chunk) < 128 or chunk >= 2 * k):
        chunk //= 2
    return chunk


def regions(m: int, n: int, k: int, rank: int, parts: int, tiles: int) -> Regions:
    """What `m` tokens below 64 take of the workspace; every region is a multiple of 16 bytes."""
    chunk = chunk_size(k, tiles)
    chunks = -(-k // chunk)
    z, _ = partial_sizes(m, n, k, rank, parts)
    sizes = (z, parts * chunks * chunk, parts * chunks, -(-parts * chunks * m * chunk // 2), chunks * m * n)
    return Regions(*(-(-size // 4) * 4 for size in sizes))


def workspace_size(n: int, k: int, rank: int, parts: int, tiles: int) -> int:
    """fp32 numbers that any launch over up to 63 tokens needs."""
    return max(regions(m, n, k, rank, parts, tiles).total for m in (1, 16, 32, 63))
