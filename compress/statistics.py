"""What calibration measures about a linear's inputs, collected by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..serving.errors import RunError


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
        rows = x.reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        if self._sum.ndim == 1:
            self._sum += rows.square().sum(0)
        else:
            add_gram(self._sum, rows)

    @property
    def hessian(self) -> Tensor:
        """`X^T X / tokens`, fp32 `[K, K]`, symmetric."""
        if self._sum.ndim != 2:
            raise ValueError("these statistics were collected without a Hessian")
        return mirror_upper(self._sum) / max(self.tokens, 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean of `x**2` per input, fp32 `[K]`: the Hessian's diagonal."""
        diagonal = self._sum if self._sum.ndim == 1 else self._sum.diagonal()
        return diagonal / max(self.tokens, 1)

    def require_usable(self, module: str) -> None:
        """Raise RunError, naming `module` and the token count, when calibration gave nothing to work with."""
        mean_square = self.mean_square
        if not bool(torch.isfinite(mean_square).all()):
            raise RunError(
                f"{module}: its inputs are not finite after {self.tokens} calibration tokens;"
                " try --dtype float32, or check the checkpoint for damaged weights"
            )
        if self.tokens == 0 or not bool((mean_square > 0).any()):
            raise RunError(
                f"{module}: no non-zero input in {self.tokens} calibration tokens; use more or other calibration text"
            )


def add_gram(total: Tensor, rows: Tensor, tile: int = 256) -> None:
    """Add `rows^T rows` to the upper triangle, by tiles, of `total` `[K, K]`; about half the full product's work."""
    size = total.shape[0]
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror_upper(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `upper`."""
    return torch.triu(upper) + torch.triu(upper, 1).T


@contextmanager
def collect(linears: dict[str, nn.Linear], hessian: bool) -> Iterator[dict[str, InputStatistics]]:
    """Hook `linears` (name -> module) and fill one InputStatistics per distinct input while the block runs.

    Linears that read the same tensor (q/k/v, gate/up) share one object in the returned mapping. Which ones do is seen
    on the first forward pass: they receive the very same storage, one right after the other.
    """
    statistics: dict[str, InputStatistics] = {}
    leader: dict[str, str] = {}
    last: tuple[str, Tensor] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x: Tensor = args[0]
            if name not in leader:
                shared = last is not None and last[1] is x
                leader[name] = leader[last[0]] if shared and last is not None else name
                if not shared:
                    statistics[name] = InputStatistics(x.shape[-1], hessian, x.device)
                last = (name, x)
            if leader[name] == name:
                statistics[name].add(x)

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        last = None
        for name, first in leader.items():
            statistics[name] = statistics[first]


@contextmanager
def keep_inputs(linears: dict[str, nn.Linear], rows: int = 256) -> Iterator[dict[str, Tensor]]:
    """Keep up to `rows` evenly spaced input rows `[rows, K]` of each linear from the last forward pass in the `with`."""
    kept: dict[str, Tensor] = {}
    last: tuple[Tensor, Tensor] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x: Tensor = args[0]
            if last is None or last[0] is not x:  # linears that share an input share its rows
                flat = x.reshape(-1, x.shape[-1])
                last = (x, flat[:: -(-len(flat) // rows)].clone())
            kept[name] = last[1]

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        last = None
