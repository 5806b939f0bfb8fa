"""Launches of the group-sparse int4 kernels, and the heuristics behind them: pure functions of shapes and types.

The same plans are launched on a GPU, interpreted, metered and compiled ahead of time (on meta tensors).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import AMD, EVERY_GPU, NVIDIA, Launch
from .layout import LARGEST_NUMBER, ROWS, UNIT_SETS, Prepared, unit_blocks

TOKENS = 8  # of a program of `fragment`
SIMT_TOKENS = 2  # of a program of `simt`
SIMT_MOST = 16
EXPAND_FROM = 64
WARPS_WANTED = 2048  # about fifteen per multiprocessor of the largest GPUs
LARGEST = 2**31 - 1


def choose(m: int, n: int, k: int, dtype: torch.dtype, target: str, asm: bool = True) -> str:
    """The kernel for `m` tokens: `fragment`, `simt`, or `expand` (then a dense matmul).

    `asm`: whether kernels with inline assembly may run, which on hardware they may once they agreed with their
    reference. A token costs `fragment` about 0.8 instructions per kept weight and `simt` about 3; expanding writes
    and reads two bytes per dense weight, which many tokens pay off.
    """
    if asm and target in NVIDIA:
        return "fragment" if m < EXPAND_FROM else "expand"
    return "simt" if m <= SIMT_MOST else "expand"


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str, group_size: int = 16) -> tuple[bool, str]:
    """Whether the kernels take a weight of `shape` `(N, K)` with inputs of `dtype` on `target`; else why not."""
    n, k = shape
    if target not in EVERY_GPU:
        return False, f"the group kernels are not built for {target}"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"the group kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if -(-k // group_size) > LARGEST_NUMBER + 1:
        return False, f"the group kernels number {LARGEST_NUMBER + 1} groups of a row, too few for K = {k}"
    if max(n, k) * EXPAND_FROM > LARGEST:
        return False, f"the group kernels count with 32 bits, too few for {n} x {k}"
    return True, ""


def unroll(tokens: int) -> int:
    """Units that a warp has under way at a time; with many tokens, registers are better spent on these."""
    return 2 if tokens <= 2 else 1


def count_warps(tiles: int, units: int, step: int) -> int:
    """Warps that share a tile of `units`: a power of two up to 8, none without work, about `WARPS_WANTED` in all."""
    warps = 1
    while warps < 8 and 2 * warps * step <= units and warps * tiles < WARPS_WANTED:
        warps *= 2
    return warps


def plan_fragment(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` `[M, width]`, M < 64, contiguous, 16 bits, as `op.pad_columns` pads it; `y` `[M, N]` of any float type."""
    m = x.shape[0]
    tokens = min(TOKENS, _power_of_two(m))
    tiles, units = _size(prepared)
    warps = count_warps(tiles, units, unroll(tokens))
    arguments, constants = _shared(x, prepared, y, bias)
    even = prepared.unit_start is None and units % (warps * unroll(tokens)) == 0
    return Launch(
        grid=(-(-m // tokens), _programs(prepared)),
        arguments=arguments,
        constants={**constants, "TOKENS": tokens, "WARPS": warps, "UNROLL": unroll(tokens), "EVEN": int(even)},
        num_warps=warps,
    )


def plan_simt(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    """`x` and `y` as for `plan_fragment`."""
    m = x.shape[0]
    tokens = min(SIMT_TOKENS, _power_of_two(m))
    tiles, units = _size(prepared)
    warp = 64 if target in AMD else 32
    blocks = units * unit_blocks(prepared.group)
    warps = min(4, count_warps(tiles, blocks, warp // 4))
    arguments, constants = _shared(x, prepared, y, bias)
    return Launch(
        grid=(-(-m // tokens), _programs(prepared)),
        arguments=arguments,
        constants={**constants, "TOKENS": tokens, "LANES": warp * warps},
        num_warps=warps,
    )


def plan_expand(prepared: Prepared, weight: Tensor, target: str) -> Launch:
    """`weight` `[N, K]`, of any float type and full of zeros, receives the kept groups."""
    warp = 64 if target in AMD else 32
    arguments: dict[str, Any] = {
        "codes": prepared.codes,
        "scales": prepared.scales,
        "index": prepared.index,
        "weight": weight,
        "N": prepared.rows,
        "K": prepared.columns,
        "units": _size(prepared)[1],
    }
    constants: dict[str, Any] = {"GROUP": prepared.group, "LANES": 2 * warp}
    for name in ("order", "unit_start"):
        tensor = getattr(prepared, name)
        (constants if tensor is None else arguments)[name] = tensor
    return Launch(grid=(_size(prepared)[0],), arguments=arguments, constants=constants, num_warps=2)


def _shared(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that both linears have; a tensor that is not there is a constant None."""
    arguments: dict[str, Any] = {
        "codes": prepared.codes,
        "scales": prepared.scales,
        "index": prepared.index,
        "x": x.view(torch.int32),
        "y": y,
        "M": x.shape[0],
        "N": prepared.rows,
        "width": x.shape[1],
        "units": _size(prepared)[1],
    }
    constants: dict[str, Any] = {"GROUP": prepared.group, "BF16": int(x.dtype == torch.bfloat16)}
    optional = {name: getattr(prepared, name) for name in ("order", "unit_start", "worker_start")}
    for name, tensor in {**optional, "bias": bias}.items():
        (constants if tensor is None else arguments)[name] = tensor
    return arguments, constants


def _size(prepared: Prepared) -> tuple[int, int]:
    """Tiles, and units of each (on average, over the layer)."""
    tiles = -(-prepared.rows // ROWS)
    quads = prepared.index.shape[0] // tiles if prepared.unit_start is not None else prepared.index.shape[1]
    return tiles, quads * 4 // UNIT_SETS[prepared.group]


def _programs(prepared: Prepared) -> int:
    if prepared.worker_start is None:
        return prepared.codes.shape[0]
    return prepared.worker_start.shape[0] - 1


def _power_of_two(m: int) -> int:
    return 1 << (m - 1).bit_length()
