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
from ..two_four.plan import EXPAND_FROM, GEMV_TOKENS, WARPS_WANTED, num_warps
from ..two_four.plan import can_run as two_four_can_run
from ..two_four.plan import choose as two_four_choose
from .layout import BLOCK, Prepared, kernel_group

__all__ = [
    "EXPAND_FROM",
    "GEMV_TOKENS",
    "MMA_TOKENS",
    "can_run",
    "choose",
    "plan_dot",
    "plan_expand",
    "plan_mma_sp",
    "plan_select",
]

MMA_TOKENS = 16  # most tokens of `mma_sp`: the sums of more do not fit the registers
MAGIC = 0x4B000000  # the bits of 2^23
SPAN = 4 * BLOCK  # columns of one trip of a warp of `mma_sp`


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str, group_size: int) -> tuple[bool, str]:
    """Whether the kernels take a weight of `shape` `(N, K)` with inputs of `dtype` on `target`; else why not."""
    try:
        kernel_group(group_size, shape[1])
    except FormatError as error:
        return False, str(error)
    return two_four_can_run(shape, dtype, target)


def choose(m: int, n: int, k: int, dtype: torch.dtype, target: str, asm: bool = True) -> str:
    """The kernel for `m` tokens, as for 16-bit values, but `mma_sp` up to `MMA_TOKENS` and for whole trips.

    With a ragged K the compiler moves the weights of `mma_sp` through shared memory.
    """
    return two_four_choose(m, n, k, dtype, target, asm and k % SPAN == 0 and m <= MMA_TOKENS)


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
        # More tokens need more registers.
        constants={**constants, "M": x.shape[0], "WARPS": split, "BLOCKS": 2 if x.shape[0] <= 4 else 1},
        num_warps=num_warps(32 * split, target),
    )


def plan_mma_sp(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 16, contiguous; `y` `[M, N]` of any float type."""
    m = x.shape[0]
    split = column_split(prepared.n, prepared.k, SPAN)
    # With many tokens, warps of two row tiles share what they read of x in the L1 cache.
    row_tiles = 2 if m > 16 and split <= 4 else 1
    arguments, constants = _shared(x, prepared, y, bias, split, SPAN)
    return Launch(
        grid=(-(-prepared.codes.shape[0] // row_tiles),),
        arguments={
            **arguments,
            "x": x.view(torch.int32),
            "words": prepared.k // 2,
            "M": m,
            "quads": prepared.scales.shape[1],
        },
        constants={**constants, "TOKEN_TILES": -(-m // 8), "SPLIT": split, "WARPS": split * row_tiles},
        num_warps=num_warps(32 * split * row_tiles, target),
    )


def plan_dot(
    x: Tensor,
    prepared: Prepared,
    y: Tensor,
    bias: Tensor | None,
    target: str,
    dot_dtype: torch.dtype | None = None,
) -> Launch:
    """`x` `[M, K]`, M <= 64, contiguous.

    `dot_dtype`: of the products, x's by default (Triton's interpreter lacks bf16).
    """
    import triton.language as tl

    m, row_tiles = x.shape[0], 2
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    arguments, constants = _weight(prepared, x.dtype)
    (constants if bias is None else arguments)["bias"] = bias
    return Launch(
        grid=(-(-prepared.codes.shape[0] // row_tiles),),
        arguments={
            **arguments,
            "x": x.view(torch.int64),
            "y": y,
            "groups": prepared.k // 4,
            "M": m,
            "octets": prepared.metadata.shape[1],
        },
        constants={
            **constants,
            "BLOCK_M": 16 if m <= 16 else 32 if m <= 32 else 64,
            "ROW_TILES": row_tiles,
            "DOT": types[dot_dtype or x.dtype],
        },
    )


def plan_expand(prepared: Prepared, dense: Tensor, target: str) -> Launch:
    """`dense` `[N, K]`, contiguous, float16 or bfloat16: where the weight is written."""
    octets = 4
    arguments, constants = _weight(prepared, dense.dtype)
    return Launch(
        grid=(prepared.codes.shape[0], -(-prepared.metadata.shape[1] // octets)),
        arguments={**arguments, "dense": dense.view(torch.int64), "groups": prepared.k // 4},
        constants={**constants, "OCTETS": octets},
        num_warps=num_warps(32 * octets, target),
    )


def _shared(
    x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, split: int, columns: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the streaming kernels have in common."""
    arguments, constants = _weight(prepared, x.dtype)
    (constants if bias is None else arguments)["bias"] = bias
    return (
        {**arguments, "y": y, "trips": -(-prepared.k // (columns * split))},
        {**constants, "EVEN": prepared.k % (columns * split) == 0},
    )


def _weight(prepared: Prepared, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weight's arguments and constants; absent zero points are a constant."""
    arguments: dict[str, Any] = {
        "codes": prepared.codes,
        "metadata": prepared.metadata,
        "scales": prepared.scales,
        "N": prepared.n,
        "blocks": prepared.codes.shape[1],
        "code_stride": prepared.codes[0].numel(),
        "metadata_stride": prepared.metadata[0].numel(),
        "scale_stride": prepared.scales[0].numel(),
    }
    constants: dict[str, Any] = {"GROUP": prepared.group, "BF16": dtype == torch.bfloat16}
    (constants if prepared.zeros is None else arguments)["zeros"] = prepared.zeros
    return arguments, constants
