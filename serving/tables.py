"""Reading some rows of a large stored matrix: the vocabulary is often most of a model, and rarely needed whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import TensorInfo, read_tensor
from .scheme import LinearScheme
from .storage import dense_weight


@dataclass(frozen=True)
class Table:
    """A stored matrix `[R, C]`: `tensors` are its own by suffix (`weight`, or those of `scheme`).

    Only where the scheme's rows lie apart can some of them be read.
    """

    name: str
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]
    scheme: LinearScheme | None = None

    def read(self, rows: slice, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Rows `start` to `stop` of `rows`, `[stop - start, C]` in `dtype`."""
        return self._dense(lambda suffix, info: self._rows(suffix, info, rows, device), dtype)

    def gather(self, rows: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The given rows `[len(rows), C]` in `dtype`, read one by one."""

        def read(suffix: str, info: TensorInfo) -> Tensor:
            return torch.cat([self._rows(suffix, info, slice(row, row + 1), device) for row in rows])

        return self._dense(read, dtype)

    def whole(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """All rows `[R, C]` in `dtype`."""
        return self._dense(lambda suffix, info: self._rows(suffix, info, None, device), dtype)

    def _rows(self, suffix: str, info: TensorInfo, rows: slice | None, device: torch.device | str) -> Tensor:
        return read_tensor(f"{self.name}.{suffix}", info, None, device, rows)

    def _dense(self, read: Callable[[str, TensorInfo], Tensor], dtype: torch.dtype) -> Tensor:
        found = {suffix: read(suffix, info) for suffix, info in self.tensors.items()}
        if self.scheme is None:
            return found["weight"].to(dtype)
        count = len(next(iter(found.values()))) if self.scheme.rows_apart else self.shape[0]
        return dense_weight(self.scheme, found, (count, self.shape[1]), dtype)
