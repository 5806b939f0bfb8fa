"""What calibration measures about a linear's inputs, collected by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
        return mirror_upper(self._sum).div_(max(self.tokens, 1))

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


def add_gram(total: Tensor, rows: Tensor, tile: int = 128) -> None:
    """Add `rows^T rows` to the upper triangle, by tiles, of `total` `[K, K]`; about half the full product's work."""
    size = total.shape[0]
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror_upper(upper: Tensor, tile: int = 128) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `upper`; holds no other matrix of its size meanwhile."""
    result = upper.clone()
    for start in range(0, len(upper), tile):
        stop = start + tile
        corner = upper[start:stop, start:stop]
        result[start:stop, start:stop] = corner.triu() + corner.triu(1).T
        result[stop:, start:stop] = upper[start:stop, stop:].T
    return result


Forward = Callable[[Tensor], object]


def collect(
    linears: Mapping[str, nn.Linear], hessian: bool, forward: Forward, inputs: Iterable[Tensor]
) -> dict[str, InputStatistics]:
    """Run `forward` on each of `inputs` and measure what the `linears` (name -> module) inside it receive.

    Linears that read the same tensor (q/k/v, gate/up) share one InputStatistics; a linear that is never called is
    missing from the result. Which share is seen on the first pass: they receive the very same tensor in a row.
    """
    statistics: dict[str, InputStatistics] = {}
    leader: dict[str, str] = {}

    def measure(name: str, x: Tensor, before: tuple[str, Tensor] | None) -> None:
        if name not in leader:
            shared = before is not None and before[1] is x
            leader[name] = leader[before[0]] if shared and before is not None else name
            if not shared:
                statistics[name] = InputStatistics(x.shape[-1], hessian, x.device)
        if leader[name] == name:
            statistics[name].add(x)

    _watch(linears, forward, inputs, measure)
    return {name: statistics[first] for name, first in leader.items()}


def keep_inputs(linears: Mapping[str, nn.Linear], forward: Forward, x: Tensor, rows: int = 256) -> dict[str, Tensor]:
    """Run `forward` on `x` once; up to `rows` evenly spaced input rows `[rows, K]` of each of the `linears`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, before: tuple[str, Tensor] | None) -> None:
        if before is not None and before[1] is x:
            kept[name] = kept[before[0]]
            return
        flat = x.reshape(-1, x.shape[-1])
        kept[name] = flat[:: -(-len(flat) // rows)].clone()

    _watch(linears, forward, [x], keep)
    return kept


class _AllSeen(Exception):
    """Ends a forward pass whose remaining work nobody needs."""


def _watch(
    linears: Mapping[str, nn.Linear],
    forward: Forward,
    inputs: Iterable[Tensor],
    see: Callable[[str, Tensor, tuple[str, Tensor] | None], None],
) -> None:
    """Call `see(name, x, (name, x) of the call before)` for every call of a linear while `forward` runs on `inputs`.

    Once a first pass has called each linear exactly once, later passes end at the last of them: the matmul behind the
    last input (a quarter of a Llama block's work) is not needed to know that input.
    """
    calls: list[str] = []
    last: str | None = None
    before: tuple[str, Tensor] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def on_call(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal before
            see(name, args[0], before)
            before = (name, args[0])
            calls.append(name)
            if name == last:
                raise _AllSeen

        return on_call

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        for x in inputs:
            calls.clear()
            before = None
            with suppress(_AllSeen):
                forward(x)
            if sorted(calls) == sorted(linears):
                last = calls[-1]
    finally:
        for handle in handles:
            handle.remove()
