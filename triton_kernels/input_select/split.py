"""How a launch walks K, and the room that its partial sums take: pure functions of a linear's size."""

from __future__ import annotations

from typing import NamedTuple

TILE = 32  # columns; 64 bytes of a row, the least that DRAM delivers
GEMV_THREADS = 128  # of a program; each holds an eighth of a row per load


class Split(NamedTuple):
    """How a launch walks K: `slices` programs per column tile, each `slice_k` inputs."""

    slices: int
    slice_k: int


def gemv_unroll(rows: int) -> int:
    """Weight loads that a thread of `gemv` keeps in flight, for programs of this many rows: a trip takes 32 of each."""
    return 16 if rows >= 2048 else 8 if rows >= 512 else 4


def gemv_split(n_tiles: int, k: int, limit: int = 16) -> Split:
    """Slices of K for one token: enough programs for a GPU, but no slice under 512 inputs."""
    slices = min(limit, max(1, min(128 // max(1, n_tiles), k // 512)))
    step = gemv_unroll(k // slices) * GEMV_THREADS * 8 // TILE
    return _whole(k, slices, step)


def dot_split(m: int, n_tiles: int, k: int, limit: int = 8) -> Split:
    """Slices of K for 2 to 63 tokens: a program hides little latency, so several per multiprocessor."""
    wanted = 512 if m <= 16 else 256
    slices = min(limit, max(1, min(wanted // max(1, n_tiles), k // 256)))
    return _whole(k, slices, 128)


def _whole(k: int, slices: int, step: int) -> Split:
    """At most `slices` slices of whole steps; one, when K is 0."""
    slice_k = max(1, -(-k // (slices * step))) * step
    return Split(max(1, -(-k // slice_k)), slice_k)


def split(m: int, n_tiles: int, k: int) -> Split:
    """Slices of K for `m` tokens below 64."""
    return gemv_split(n_tiles, k) if m == 1 else dot_split(m, n_tiles, k)


def partial_sizes(m: int, n: int, k: int, rank: int, parts: int) -> tuple[int, int]:
    """fp32 numbers in the workspace for `m` tokens: z, and the partial sums of y (0 when K is not split).

    y is taken as one part here; more parts have more tiles and so fewer slices.
    """
    z = split(m, parts * -(-rank // TILE), k).slices * m * parts * rank if rank else 0
    slices = split(m, -(-n // TILE), k).slices
    return -(-z // 4) * 4, slices * m * n if slices > 1 else 0


def workspace_size(n: int, k: int, rank: int, parts: int) -> int:
    """fp32 numbers that any launch over up to 63 tokens needs for a linear of this size."""
    return max(sum(partial_sizes(m, n, k, rank, parts)) for m in (1, 16, 32, 63)) or 4
