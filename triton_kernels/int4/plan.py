"""Launches of the dense integer kernels, and the heuristics behind them: pure functions of shapes, types and targets.

The same plans are launched on a GPU, interpreted, metered and compiled ahead of time (on meta tensors).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import FormatError
from ..launch import AMD, EVERY_GPU, NVIDIA, Launch
from .layout import ROWS, Prepared, kernel_group

GEMV_TOKENS = 8  # most tokens of `simt`
FRAGMENT_TOKENS = 32  # most tokens of `fragment`: the sums of more do not fit the registers
EXPAND_FROM = 64  # tokens
WARPS_WANTED = 2048  # about fifteen per multiprocessor of the largest GPUs
LARGEST = 2**31 - 1


class FragmentTiles(NamedTuple):
    """Tiles of `fragment`: tokens by the eight, row tiles and warps per row tile of a program, columns per trip."""

    token_tiles: int
    warps_n: int
    warps_k: int
    span: int


def choose(m: int, n: int, k: int, dtype: torch.dtype, target: str, asm: bool = True) -> str:
    """The kernel for `m` tokens: `fragment`, `simt`, `dot`, or `expand` (then a dense matmul).

    `asm`: whether kernels with inline assembly may run, which on hardware they may once they agreed with their
    reference. From 64 tokens on, the matmul is bound by arithmetic, and expanding the weight costs less than it.
    """
    if m >= EXPAND_FROM:
        return "expand"
    if asm and m <= FRAGMENT_TOKENS and target in NVIDIA and dtype in (torch.float16, torch.bfloat16):
        return "fragment"
    return "simt" if m <= GEMV_TOKENS else "dot"


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str, group_size: int = 128) -> tuple[bool, str]:
    """Whether the kernels take a weight of `shape` `(N, K)` with inputs of `dtype` on `target`; else why not."""
    try:
        kernel_group(group_size, shape[1])
    except FormatError as error:
        return False, str(error)
    if target not in EVERY_GPU:
        return False, f"the integer kernels are not built for {target}"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"the integer kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if max(shape) * EXPAND_FROM > LARGEST:
        return False, f"the integer kernels count with 32 bits, too few for {shape[0]} x {shape[1]}"
    return True, ""


def fragment_tiles(m: int, n: int, k: int, group: int) -> FragmentTiles:
    """Warps share the columns of a row tile up to about `WARPS_WANTED`; many tokens share x between two tiles."""
    token_tiles = next(count for count in (1, 2, 4) if 8 * count >= m)
    span = 512 if k >= 1024 else max(256, 4 * group)
    tiles, warps_k = -(-n // ROWS), 1
    warps_n = 2 if token_tiles > 1 else 1
    while warps_k < 8 // warps_n and warps_k * span < k and warps_k * tiles < WARPS_WANTED:
        warps_k *= 2
    return FragmentTiles(token_tiles, warps_n, warps_k, span)


def plan_fragment(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M < 64, fp16 or bf16, contiguous, K divisible by 8; `y` `[M, N]` of any float type."""
    m, k = x.shape
    tiles = fragment_tiles(m, prepared.rows, k, prepared.group)
    arguments, constants = _shared(prepared, bias=bias)
    words = x.view(torch.int32)
    return Launch(
        grid=(-(-prepared.codes.shape[0] // tiles.warps_n),),
        arguments={**arguments, "x": words, "y": y, "M": m, "K": k, "spans": _ceil(k, tiles.span)},
        constants={
            **constants,
            "BF16": int(x.dtype == torch.bfloat16),
            "TOKEN_TILES": tiles.token_tiles,
            "WARPS_N": tiles.warps_n,
            "WARPS_K": tiles.warps_k,
            "SPAN": tiles.span,
            "EVEN": int(k % (tiles.span * tiles.warps_k) == 0),
        },
        num_warps=tiles.warps_n * tiles.warps_k,
    )


def plan_simt(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, K]`, M <= 8, of any float type, contiguous; `y` `[M, N]` of any float type."""
    m, k = x.shape
    tokens = _power_of_two(m)
    rows = {1: 8, 2: 8, 4: 4, 8: 2}[tokens]
    per_lane = 64 // prepared.bits  # columns
    warp = _warp_size(target)
    warps = 4
    while warps > 1 and warps * warp * per_lane >= 2 * k:
        warps //= 2
    lanes = warps * warp
    arguments, constants = _shared(prepared, bias=bias)
    return Launch(
        grid=(prepared.codes.shape[0] * (8 // rows),),
        arguments={**arguments, "x": x, "y": y, "M": m, "K": k},
        constants={
            **constants,
            "TOKENS": tokens,
            "ROWS": rows,
            "LANES": lanes,
            "EVEN": int(k % (lanes * per_lane) == 0),
        },
        num_warps=warps,
    )


def plan_dot(
    x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str, dot_dtype: torch.dtype | None = None
) -> Launch:
    """`x` `[M, K]`, 9 <= M < 64; `dot_dtype`: what the weights are rounded to, x's dtype by default."""
    import triton.language as tl

    m, k = x.shape
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    arguments, constants = _shared(prepared, bias=bias)
    words, tiles = 32 * (prepared.bits // 4), 4 if prepared.rows >= 16384 else 2
    return Launch(
        grid=(-(-prepared.codes.shape[0] // tiles),),
        arguments={**arguments, "x": x, "y": y, "M": m, "K": k},
        constants={
            **constants,
            "TOKENS": max(16, _power_of_two(m)),
            "TILES": tiles,
            "WORDS": words,
            "DOT_DTYPE": names[dot_dtype or x.dtype],
        },
    )


def plan_expand(prepared: Prepared, weight: Tensor, target: str) -> Launch:
    """`weight` `[N, K]`, of any float type, receives the dense weight."""
    words = 64
    arguments, constants = _shared(prepared)
    return Launch(
        grid=(prepared.codes.shape[0], _ceil(prepared.codes.shape[1], words // 16)),
        arguments={**arguments, "weight": weight, "K": prepared.columns},
        constants={**constants, "WORDS": words},
        num_warps=2,
    )


def _shared(prepared: Prepared, **optional: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that all launches have; a tensor that is not there is a constant None."""
    arguments: dict[str, Any] = {
        "codes": prepared.codes,
        "scales": prepared.scales,
        "N": prepared.rows,
        "blocks": prepared.codes.shape[1],
        "quads": prepared.scales.shape[1],
    }
    constants: dict[str, Any] = {"BITS": prepared.bits, "GROUP": prepared.group}
    for name, tensor in {"zeros": prepared.zeros, **optional}.items():
        (constants if tensor is None else arguments)[name] = tensor
    return arguments, constants


def _warp_size(target: str) -> int:
    return 64 if target in AMD else 32


def _power_of_two(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
