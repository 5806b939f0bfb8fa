"""Launches of the 2:4 kernels, and the heuristics behind them: pure functions of shapes, types and targets.

The same plans are launched on a GPU, interpreted, metered and compiled ahead of time (on meta tensors).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import NVIDIA, Launch
from .layout import COLUMNS, OCTET, ROWS, Prepared

GEMV_TOKENS = 8  # one launch of `select`
EXPAND_FROM = 64
WARPS_WANTED = 1024  # about eight per multiprocessor of the largest GPUs
LARGEST = 2**31 - 1


def choose(m: int, n: int, k: int, dtype: torch.dtype, target: str, asm: bool = True) -> str:
    """The kernel for `m` tokens: `select`, `mma_sp`, `dot`, or `expand` (then a dense matmul).

    `asm`: whether kernels with inline assembly may run, which on hardware they may once they agreed with their
    reference.
    """
    if m >= EXPAND_FROM:
        return "expand"
    if asm and target in NVIDIA:
        return "mma_sp"
    return "select" if m <= GEMV_TOKENS else "dot"


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str) -> tuple[bool, str]:
    """Whether the kernels take a weight of `shape` `(N, K)` with inputs of `dtype` on `target`; else why not."""
    n, k = shape
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"the 2:4 kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if k % 4:
        return False, f"2:4 needs an input size divisible by 4, got K = {k}"
    if max(n, k) * EXPAND_FROM > LARGEST:
        return False, f"the 2:4 kernels count with 32 bits, too few for {n} x {k}"
    return True, ""


def column_split(n: int, k: int) -> int:
    """Into how many warps (a power of two up to 8) a row tile's columns are split."""
    octets, rows = -(-k // (COLUMNS * OCTET)), -(-n // ROWS)
    split = 1
    while split < 8 and 2 * split <= octets and split * rows < WARPS_WANTED:
        split *= 2
    return split


def tail(k: int, split: int) -> int:
    """The kernels' `TAIL`: 0 when every warp gets whole octets, 1 when K ends with an octet, else 2."""
    octet = COLUMNS * OCTET
    return 2 if k % octet else int(k % (octet * split) != 0)


def trips(k: int, split: int) -> int:
    """Octets per warp."""
    return -(-k // (COLUMNS * OCTET * split))


def num_warps(lanes: int, target: str) -> int:
    """Warps of the target that give `lanes` threads."""
    return max(1, lanes // (64 if target.startswith("gfx9") else 32))


def plan_select(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 8, contiguous; `y` `[M, N]` of any float type."""
    split = column_split(prepared.n, prepared.k)
    fragments, metadata = prepared.fragments.view(torch.int64), prepared.metadata
    arguments, constants = _shared(fragments, metadata, prepared, bias, y, split)
    return Launch(
        grid=(fragments.shape[0],),
        arguments={**arguments, "x": x.view(torch.int64), "groups": prepared.k // 4},
        constants={**constants, "M": x.shape[0], "WARPS": split},
        num_warps=num_warps(32 * split, target),
    )


def plan_mma_sp(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 64, contiguous; `y` `[M, N]` of any float type."""
    m = x.shape[0]
    split = column_split(prepared.n, prepared.k)
    # With many tokens, warps of two row tiles share what they read of x in the L1 cache.
    row_tiles = 2 if m > 16 and split <= 4 else 1
    arguments, constants = _shared(prepared.fragments, prepared.metadata, prepared, bias, y, split)
    return Launch(
        grid=(-(-prepared.fragments.shape[0] // row_tiles),),
        arguments={**arguments, "x": x.view(torch.int32), "words": prepared.k // 2, "M": m},
        constants={
            **constants,
            "TOKEN_TILES": -(-m // 8),
            "SPLIT": split,
            "WARPS": split * row_tiles,
        },
        num_warps=num_warps(32 * split * row_tiles, target),
    )


def _shared(
    fragments: Tensor, metadata: Tensor, prepared: Prepared, bias: Tensor | None, y: Tensor, split: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the streaming kernels have in common."""
    arguments = {
        "fragments": fragments,
        "metadata": metadata,
        "y": y,
        "N": prepared.n,
        "tiles": fragments.shape[1],
        "trips": trips(prepared.k, split),
        "fragment_stride": fragments[0].numel(),
        "metadata_stride": metadata[0].numel(),
    }
    constants: dict[str, Any] = {"BF16": bool(prepared.bf16), "TAIL": tail(prepared.k, split)}
    (constants if bias is None else arguments)["bias"] = bias
    return arguments, constants


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
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    arguments, constants = _shared(prepared.fragments.view(torch.int64), prepared.metadata, prepared, bias, y, 1)
    for name in ("trips", "TAIL"):
        arguments.pop(name, constants.pop(name, None))
    return Launch(
        grid=(-(-prepared.fragments.shape[0] // row_tiles),),
        arguments={
            **arguments,
            "x": x.view(torch.int64),
            "groups": prepared.k // 4,
            "M": m,
            "octets": prepared.metadata.shape[1],
        },
        constants={
            **constants,
            "BLOCK_M": block_m,
            "ROW_TILES": row_tiles,
            "DOT": types[dot_dtype or x.dtype],
        },
        num_warps=8 if block_m == 64 else 4,  # the sums of 64 tokens do not fit the registers of four warps everywhere
    )


def plan_expand(prepared: Prepared, dense: Tensor, target: str) -> Launch:
    """`dense` `[N, K]`, contiguous, of the values' dtype: where the weight is written."""
    octets = 4
    return Launch(
        grid=(prepared.fragments.shape[0], -(-prepared.metadata.shape[1] // octets)),
        arguments={
            "fragments": prepared.fragments.view(torch.int64),
            "metadata": prepared.metadata,
            "dense": dense.view(torch.int64),
            "N": prepared.n,
            "groups": prepared.k // 4,
            "tiles": prepared.fragments.shape[1],
            "fragment_stride": prepared.fragments[0].numel() // 2,
            "metadata_stride": prepared.metadata[0].numel(),
        },
        constants={"OCTETS": octets},
        num_warps=num_warps(32 * octets, target),
    )
