"""What calibration measures about a linear's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..serving.errors import RunError
from .world import ALONE, World

_TILE = 256  # rows of a Gram matrix that are added to at once


class InputStatistics:
    """Second moments of one input `x` `[tokens, K]`, shared by every linear that reads it.

    `hessian` is `X^T X / tokens` `[K, K]` fp32 (the layer-wise reconstruction Hessian up to the factor 2 that no solver
    depends on); `tokens` is the number of rows seen. Without `hessian=True` only its diagonal is kept.
    """

    def __init__(self, size: int, hessian: bool, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros((size, size) if hessian else size, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Accumulate `x` `[..., K]`; the sum is kept in fp32."""
        rows = x.reshape(-1, x.shape[-1])
        self.tokens += len(rows)
        if self._sum.ndim == 1:
            self._sum += rows.float().square().sum(0)
        else:
            add_gram(self._sum, rows)

    def collect(self, inputs: Sequence[Tensor], world: World) -> None:
        """Accumulate all processes' `inputs` `[..., K]`, in the order of the processes: to the bit what one process
        gets that adds them all."""

        def rows() -> Iterator[Tensor]:
            return (x.reshape(-1, x.shape[-1]) for x in inputs)

        self.tokens += world.total(sum(map(len, rows())))
        if self._sum.ndim == 2:
            add_grams(self._sum, rows, world)
            return

        def add(_: Sequence[int]) -> None:
            for x in rows():
                self._sum += x.float().square().sum(0)

        world.chain(self._sum, {0: self._sum}, add)

    @property
    def hessian(self) -> Tensor:
        """`X^T X / tokens`, fp32 `[K, K]`, symmetric."""
        if self._sum.ndim != 2:
            raise ValueError("these statistics were collected without a Hessian")
        return mirror_upper(self._sum).div_(max(self.tokens, 1))

    @property
    def mean_square(self) -> Tensor:
        """Mean of `x**2` per input, fp32 `[K]`: the Hessian's diagonal."""
        diagonal = self._sum if self._sum.ndim == 1 else self._sum.diagonal()
        return diagonal / max(self.tokens, 1)

    def lean_on_magnitudes(self) -> float:
        """Mix in inputs of equal power, as far as fewer tokens than inputs were seen; returns their share.

        What a pass does is then by magnitude to that share: a shrinkage of the Hessian towards the identity (Ledoit and
        Wolf 2004), for experts that few tokens or none are routed to.
        """
        diagonal = self._sum if self._sum.ndim == 1 else self._sum.diagonal()
        share = max(0.0, 1 - self.tokens / len(diagonal))
        power = float(diagonal.mean()) or 1.0
        self._sum.mul_(1 - share)
        diagonal.add_(share * power)
        return share

    def require_usable(self, module: str) -> None:
        """Raise RunError, naming `module` and the token count, when calibration gave nothing to work with."""
        mean_square = self.mean_square
        if not bool(torch.isfinite(mean_square).all()):
            raise RunError(
                f"{module}: its inputs are not finite after {self.tokens} calibration tokens;"
                " try --dtype float32, or check the checkpoint for damaged weights"
            )
        if not bool((mean_square > 0).any()):
            raise RunError(
                f"{module}: no non-zero input in {self.tokens} calibration tokens; use more or other calibration text"
            )


def add_grams(total: Tensor, rows: Callable[[], Iterable[Tensor]], world: World) -> None:
    """`add_gram` of every process's `rows()`, in the order of the processes.

    While one process adds to a tile of rows, the one before it is at the next tile.
    """

    def add(starts: Sequence[int]) -> None:
        for x in rows():
            add_gram(total, x, starts=starts)

    world.chain(total, {start: total[start : start + _TILE, start:] for start in range(0, len(total), _TILE)}, add)


def add_gram(total: Tensor, rows: Tensor, tile: int = _TILE, starts: Sequence[int] | None = None) -> None:
    """Add `rows^T rows` to the upper triangle, by tiles, of `total` `[K, K]` fp32; about half the full product's work.

    `starts` are the first rows of the tiles to add to, if not to all.

    A CPU multiplies bf16 rows as they are, with fp32 sums, and rounds each call's product (not the total) to bf16. That
    moves an entry by 2^-9 of itself at most, averaged over the calls: far less than the damping every solver adds.
    """
    native = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    rows = rows if native else rows.float()
    for start in range(0, len(total), tile) if starts is None else starts:
        part, rest = rows[:, start : start + tile].T, rows[:, start:]
        upper = total[start : start + tile, start:]
        if native:
            upper.add_(part @ rest)
        else:
            upper.addmm_(part, rest)


def mirror_upper(upper: Tensor, tile: int = 128) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `upper`; holds no other matrix of its size meanwhile."""
    result = upper.clone()
    for start in range(0, len(upper), tile):
        stop = start + tile
        corner = upper[start:stop, start:stop]
        result[start:stop, start:stop] = corner.triu() + corner.triu(1).T
        result[stop:, start:stop] = upper[start:stop, stop:].T
    return result


def relative_error(got: Tensor, wanted: Tensor, world: World = ALONE) -> float:
    """||y' - y||^2 / ||y||^2 of outputs y' and y, those of all processes; 0 when both are zero."""
    lost, size = world.sum(torch.stack([(got - wanted).square().sum(), wanted.square().sum()])).tolist()
    return float(lost / size) if size else 0.0


def spread_rows(x: Tensor, rows: int) -> Tensor:
    """A copy of up to `rows` evenly spaced rows `[rows, K]` of `x` `[..., K]`."""
    flat = x.reshape(-1, x.shape[-1])
    return flat[:: max(1, -(-len(flat) // rows))].clone()
