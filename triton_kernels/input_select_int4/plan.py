"""Which kernels run an input-selected int4 linear, for how many tokens, with which tiles: pure functions.

`pick` lists the selected inputs of every chunk of K; `gemv` (one token) or `dot` (2 to 63) leave fp32 sums of each
chunk in the workspace; then `input_select.reduce`, or `input_select`'s kernels on `U^T` where there is a low-rank
branch, add them up in a fixed order. From 64 tokens on `expand` writes the weight out, to be multiplied with the
masked tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..input_select import plan as select_plan
from ..input_select.plan import MATMUL_FROM
from ..launch import EVERY_GPU, Launch
from .layout import TILE, Prepared, tile_width, unsupported
from .split import chunk_size, regions

Step = tuple[str, Launch]


class Lists(NamedTuple):
    """Tensors in the workspace: z, the lists that `pick` makes (see there), and the sums of each chunk."""

    z: Tensor
    rows: Tensor
    counts: Tensor
    values: Tensor
    partial: Tensor


def choose(m: int) -> str:
    """`gemv`, `dot` or `matmul` for `m` tokens."""
    return "gemv" if m == 1 else "dot" if m < MATMUL_FROM else "matmul"


def can_run(
    shape: tuple[int, int], dtype: torch.dtype, target: str, group_size: int = TILE, bits: int = 4
) -> tuple[bool, str]:
    """Whether the kernels take this linear `(N, K)` on this GPU, or why not."""
    if bits != 4:
        return False, f"input_select_int4 kernels take 4 bits, not {bits}"
    if problem := unsupported(group_size, shape[:1]):
        return False, problem
    if target not in EVERY_GPU:
        return False, f"input_select_int4 kernels are not built for {target}"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"input_select_int4 needs fp16 or bf16, got {str(dtype).removeprefix('torch.')}"
    return True, ""


def lists(prepared: Prepared, m: int, dtype: torch.dtype) -> Lists:
    """The workspace's regions for `m` tokens of `dtype`."""
    select = prepared.select
    sizes = regions(m, select.n, select.k, select.rank, len(select.parts), len(prepared.tiles))
    z, rows, counts, values, partial = select.workspace[: sizes.total].split(list(sizes))
    return Lists(z, rows.view(torch.int32), counts.view(torch.int32), values.view(dtype), partial)


def plan(
    x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str, dot_dtype: torch.dtype | None = None
) -> list[Step]:
    """The launches that compute `y[M, N]` from contiguous `x[M, K]`, M < 64, in order: `(kernel's name, launch)`.

    `dot_dtype`: the type products are formed in, x's by default (Triton's interpreter cannot do bf16).
    """
    m = x.shape[0]
    shared = lists(prepared, m, x.dtype)
    chunks = -(-prepared.select.k // chunk_size(prepared.select.k, len(prepared.tiles)))
    steps, select = select_plan.with_cuts(x, prepared.select, target)
    prepared, steps = prepared._replace(select=select), [(f"input_select.{name}", launch) for name, launch in steps]
    if prepared.select.rank:
        name, launch = select_plan.plan_rest(x, prepared.select, shared.z, target, dot_dtype)
        steps.append((f"input_select.rest_{name}", launch))
    steps.append(("input_select_int4.pick", plan_pick(x, prepared, shared, target)))
    kind = "group_" if prepared.entries is not None else ""
    if m == 1:
        steps.append((f"input_select_int4.{kind}gemv", plan_gemv(prepared, shared, target)))
    else:
        steps.append((f"input_select_int4.{kind}dot", plan_dot(x, prepared, shared, target, dot_dtype)))
    if prepared.select.rank:
        name, launch = select_plan.plan_branch(
            x, prepared.select, shared.z, shared.partial, chunks, y, bias, target, dot_dtype
        )
        steps.append((f"input_select.{name}", launch))
    else:
        steps.append(("input_select.reduce", select_plan.plan_reduce(shared.partial, bias, y, chunks)))
    return steps


def plan_pick(x: Tensor, prepared: Prepared, shared: Lists, target: str) -> Launch:
    """The lists of selected inputs."""
    select = prepared.select
    assert select.thresholds is not None  # `with_cuts` has made room, where there are none
    chunk = chunk_size(select.k, len(prepared.tiles))
    return Launch(
        grid=(-(-select.k // chunk), len(select.parts)),
        arguments={
            "x": x,
            "thresholds": select.thresholds,
            "norms": select.thresholds if select.norms is None else select.norms,
            "rows": shared.rows,
            "values": shared.values,
            "counts": shared.counts,
            "M": x.shape[0],
            "K": select.k,
            "stride_x": x.stride(0),
            "stride_t": 0 if select.counts is None else len(select.parts),
        },
        constants={"NORMS": select.norms is not None, "CHUNK": chunk},
        num_warps=max(1, chunk // 4 // _lanes(target) // 2),
    )


def plan_gemv(prepared: Prepared, shared: Lists, target: str) -> Launch:
    """One token."""
    threads = 128
    constants = _constants(prepared)
    block = threads * constants["WORDS"] // (tile_width(prepared.group_size) // 8)  # one load of a thread each
    return Launch(
        grid=_grid(prepared),
        arguments=_arguments(prepared, shared),
        constants={**constants, "UNROLL": 4, "BLOCK_K": block},
        num_warps=threads // _lanes(target),
    )


def plan_dot(x: Tensor, prepared: Prepared, shared: Lists, target: str, dot_dtype: torch.dtype | None = None) -> Launch:
    """2 to 63 tokens."""
    import triton.language as tl

    m = x.shape[0]
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return Launch(
        grid=_grid(prepared),
        arguments={**_arguments(prepared, shared), "M": m},
        constants={
            **_constants(prepared),
            "DOT": types[dot_dtype or x.dtype],
            "BLOCK_M": 16 if m <= 16 else 32 if m <= 32 else 64,
            "BLOCK_K": 32,
        },
        num_warps=2 if m <= 16 else 4,
    )


def plan_expand(prepared: Prepared, weight: Tensor, target: str) -> Launch:
    """`weight` `[K, N]`, of any float type, receives W^T."""
    constants = _constants(prepared)
    del constants["CHUNK"]
    block = 128 * constants["WORDS"] // (tile_width(prepared.group_size) // 8)  # one load of a thread each
    return Launch(
        grid=(len(prepared.tiles), -(-prepared.select.k // block)),
        arguments={**_stored(prepared), "weight": weight},
        constants={**constants, "BLOCK_K": block},
        num_warps=128 // _lanes(target),
    )


def _grid(prepared: Prepared) -> tuple[int, int]:
    tiles, k = len(prepared.tiles), prepared.select.k
    return tiles, -(-k // chunk_size(k, tiles))


def _arguments(prepared: Prepared, shared: Lists) -> dict[str, Any]:
    """What `gemv` and `dot` share."""
    lists = {"rows": shared.rows, "values": shared.values, "counts": shared.counts, "out": shared.partial}
    return {**_stored(prepared), **lists}


def _stored(prepared: Prepared) -> dict[str, Any]:
    """The weight. Absent tensors are stood in for by present ones; the constants turn them off."""
    return {
        "codes": prepared.codes,
        "scales": prepared.scales,
        "zeros": prepared.codes if prepared.zeros is None else prepared.zeros,
        "entries": prepared.tiles if prepared.entries is None else prepared.entries,
        "tiles": prepared.tiles,
        "N": prepared.select.n,
        "K": prepared.select.k,
        "kept": prepared.kept,
    }


def _constants(prepared: Prepared) -> dict[str, Any]:
    width = tile_width(prepared.group_size)
    words = min(4, prepared.group_size // 8)
    return {
        "PARTS": len(prepared.select.parts),
        "SPARSE": prepared.entries is not None,
        "ASYMMETRIC": prepared.zeros is not None,
        "SECTIONS": width // (8 * words),
        "SHARE": max(1, prepared.group_size // 32),
        "WORDS": words,
        "CHUNK": chunk_size(prepared.select.k, len(prepared.tiles)),
    }


def _lanes(target: str) -> int:
    return 64 if target.startswith("gfx9") else 32
