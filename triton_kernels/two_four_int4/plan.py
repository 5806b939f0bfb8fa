"""Launches of the 2:4 int4 kernels, and the heuristics behind them: pure functions of shapes, types and targets.

The same plans are launched on a GPU, interpreted, metered and compiled ahead of time (on meta tensors).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import FormatError
from ..launch import Launch
from ..two_four.layout import COLUMNS, OCTET, ROWS
from ..two_four.plan import GEMV_TOKENS, MMA_TOKENS, WARPS_WANTED, choose, num_warps
from ..two_four.plan import can_run as two_four_can_run
from .layout import BLOCK, Prepared, kernel_group

__all__ = ["GEMV_TOKENS", "MMA_TOKENS", "can_run", "choose", "plan_mma_sp", "plan_select"]

MAGIC = 0x4B000000  # the bits of 2^23
SPAN = 4 * BLOCK  # columns of one trip of a warp of `mma_sp`


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str, group_size: int) -> tuple[bool, str]:
    """Whether the kernels take a weight of `shape` `(N, K)` with inputs of `dtype` on `target`; else why not."""
    try:
        kernel_group(group_size, shape[1])
    except FormatError as error:
        return False, str(error)
    return two_four_can_run(shape, dtype, target)


def column_split(n: int, k: int, columns: int) -> int:
    """Into how many warps (a power of two up to 8) a row tile is split, when each takes `columns` at a time."""
    steps, rows, split = -(-k // columns), -(-n // ROWS), 1
    while split < 8 and 2 * split <= steps and split * rows < WARPS_WANTED:
        split *= 2
    return split


def plan_select(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 8, contiguous; `y` `[M, N]` of any float type."""
    split = column_split(prepared.n, prepared.k, OCTET * COLUMNS)
    arguments, constants = _shared(x, prepared, y, bias, split, OCTET * COLUMNS)
    return Launch(
        grid=(prepared.codes.shape[0],),
        arguments={**arguments, "x": x.view(torch.int64), "groups": prepared.k // 4, "magic": MAGIC},
        constants={**constants, "M": x.shape[0], "WARPS": split},
        num_warps=num_warps(32 * split, target),
    )


def plan_mma_sp(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 64, contiguous; `y` `[M, N]` of any float type."""
    m = x.shape[0]
    split = column_split(prepared.n, prepared.k, SPAN)
    # With many tokens, warps of two row tiles share what they read of x in the L1 cache.
    row_tiles = 2 if m > 16 and split <= 4 else 1
    arguments, constants = _shared(x, prepared, y, bias, split, SPAN)
    return Launch(
        grid=(-(-prepared.codes.shape[0] // row_tiles),),
        arguments={**arguments, "x": x.view(torch.int32), "words": prepared.k // 2, "M": m, "quads": prepared.scales.shape[1]},
        constants={**constants, "TOKEN_TILES": -(-m // 8), "SPLIT": split, "WARPS": split * row_tiles},
        num_warps=num_warps(32 * split * row_tiles, target),
    )


def _shared(
    x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, split: int, columns: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the streaming kernels have in common; absent tensors are constants."""
    arguments: dict[str, Any] = {
        "codes": prepared.codes,
        "metadata": prepared.metadata,
        "scales": prepared.scales,
        "y": y,
        "N": prepared.n,
        "blocks": prepared.codes.shape[1],
        "trips": -(-prepared.k // (columns * split)),
        "code_stride": prepared.codes[0].numel(),
        "metadata_stride": prepared.metadata[0].numel(),
        "scale_stride": prepared.scales[0].numel(),
    }
    constants: dict[str, Any] = {
        "GROUP": prepared.group,
        "BF16": x.dtype == torch.bfloat16,
        "EVEN": prepared.k % (columns * split) == 0,
    }
    for name, tensor in (("zeros", prepared.zeros), ("bias", bias)):
        (constants if tensor is None else arguments)[name] = tensor
    return arguments, constants
