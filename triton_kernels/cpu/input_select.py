"""Input-selected weights with floating-point values on the CPU.

CPU layout: W^T `[K, N]` as in the file, fused parts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..formats.input_select import InputSelection
from . import selected
from .matmul import DTYPES, Rows
from .selected import Columns


def prepare(weight: Tensor, selection: InputSelection, widths: Sequence[int] | None = None) -> Columns:
    """From W^T `[K, N]` and `selection` with P parts, whose numbers of outputs are `widths` (default: one part, N)."""
    weight = weight.contiguous()
    k, n = weight.shape
    widths = [n] if widths is None else widths
    parts = selected.part_table(widths, widths)
    rows = Rows("plain", (DTYPES[weight.dtype],), k, n, n, n, n, (weight,), weight.dtype)
    return Columns(rows, k, n, parts, selected.select_inputs(selection, parts, n, n, n))


def linear(x: Tensor, prepared: Columns, bias: Tensor | None = None) -> Tensor:
    """`select(x) @ W^T + (x - select(x)) @ V @ U^T + bias`; see `selected.linear`."""
    return selected.linear(prepared, x, bias)
