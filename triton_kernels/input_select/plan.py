"""Which kernels run an input-selected 16-bit linear, for how many tokens, with which tiles: pure functions.

One token goes through `gemv`; 2 to 63 through `dot`, which reads a row when any token selects it; from 64 on the union
is everything, and the masked tokens go through a dense matmul. Narrow linears split K over programs; the partial sums
go through a workspace and `reduce` adds them in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import EVERY_GPU, Launch
from .layout import Prepared
from .split import GEMV_THREADS, TILE, Split, dot_split, gemv_split, gemv_unroll, partial_sizes, split

MATMUL_FROM = 64  # tokens
REDUCE_COLUMNS = 256
SCORE_BITS = {torch.bfloat16: 15, torch.float16: 18}  # of |x| as fp32: 8 of the exponent, and the fraction's
Step = tuple[str, Launch]


class Addend(NamedTuple):
    """fp32 sums `[slices, M, N]` that an earlier launch left, to be added to a launch's result."""

    sums: Tensor
    slices: int


def choose(m: int) -> str:
    """`gemv`, `dot` or `matmul` for `m` tokens."""
    return "gemv" if m == 1 else "dot" if m < MATMUL_FROM else "matmul"


def can_run(shape: tuple[int, int], dtype: torch.dtype, target: str) -> tuple[bool, str]:
    """Whether the kernels take this linear on this GPU, or why not."""
    if target not in EVERY_GPU:
        return False, f"input_select kernels are not built for {target}"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"input_select needs fp16 or bf16, got {str(dtype).removeprefix('torch.')}"
    return True, ""


def plan(
    x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str, dot_dtype: torch.dtype | None = None
) -> list[Step]:
    """The launches that compute `y[M, N]` from contiguous `x[M, K]`, M < 64, in order: `(kernel function, launch)`.

    `dot_dtype`: see `plan_dot`.
    """
    m = x.shape[0]
    z, partial = workspaces(prepared, m)
    steps, prepared = with_cuts(x, prepared, target)
    z_slices = split(m, len(prepared.v_tiles), prepared.k).slices if prepared.rank else 0
    if prepared.rank:
        steps.append(plan_rest(x, prepared, z, target, dot_dtype))
    slices = split(m, len(prepared.tiles), prepared.k).slices
    out = y if slices == 1 else partial
    if m == 1:
        steps.append(("gemv", plan_gemv(x, prepared, out, bias, target, z=z, z_slices=z_slices)))
    else:
        steps.append(("dot", plan_dot(x, prepared, out, bias, target, z=z, z_slices=z_slices, dot_dtype=dot_dtype)))
    if slices > 1:
        steps.append(("reduce", plan_reduce(partial, bias, y, slices)))
    return steps


def with_cuts(x: Tensor, prepared: Prepared, target: str) -> tuple[list[Step], Prepared]:
    """What finds the tokens' own thresholds, where they have some, and `prepared` with room for these `[M, P]`."""
    if prepared.counts is None:
        return [], prepared
    prepared = prepared._replace(
        thresholds=torch.empty((len(x), len(prepared.parts)), dtype=torch.float32, device=x.device)
    )
    return [("cut", plan_cut(x, prepared, target))], prepared


def plan_cut(x: Tensor, prepared: Prepared, target: str) -> Launch:
    """`prepared.thresholds` `[M, P]` receives what `prepared.counts` mean for the tokens `x[M, K]`."""
    assert prepared.thresholds is not None and prepared.counts is not None
    block = max(128, 1 << (prepared.k - 1).bit_length())
    return Launch(
        grid=tuple(prepared.thresholds.shape),
        arguments={
            "x": x,
            "norms": prepared.counts if prepared.norms is None else prepared.norms,
            "counts": prepared.counts,
            "thresholds": prepared.thresholds,
            "K": prepared.k,
            "stride_x": x.stride(0),
        },
        constants={
            "NORMS": prepared.norms is not None,
            "BITS": 31 if prepared.norms is not None else SCORE_BITS.get(x.dtype, 31),
            "BLOCK_K": block,
        },
        num_warps=min(16, max(4, block // 512)) * 32 // _lanes(target),
    )


def workspaces(prepared: Prepared, m: int) -> tuple[Tensor, Tensor]:
    """The workspace's regions for z and for partial sums of y."""
    z, partial = partial_sizes(m, prepared.n, prepared.k, prepared.rank, len(prepared.parts))
    return prepared.workspace[:z], prepared.workspace[z : z + partial]


def plan_rest(x: Tensor, prepared: Prepared, z: Tensor, target: str, dot_dtype: torch.dtype | None = None) -> Step:
    """z = (x - select(x)) V of every part, as partial sums `[slices, M, P * rank]`."""
    assert prepared.v is not None
    ranks = (prepared.rank,) * len(prepared.parts)
    branch = prepared._replace(weight=prepared.v, v=None, rank=0, n=sum(ranks), parts=ranks, tiles=prepared.v_tiles)
    if x.shape[0] == 1:
        return "gemv", plan_gemv(x, branch, z, None, target, rest=True)
    return "dot", plan_dot(x, branch, z, None, target, rest=True, dot_dtype=dot_dtype)


def plan_branch(
    x: Tensor,
    prepared: Prepared,
    z: Tensor,
    partial: Tensor,
    slices: int,
    y: Tensor,
    bias: Tensor | None,
    target: str,
    dot_dtype: torch.dtype | None = None,
) -> Step:
    """y = the sum of `partial[slices, M, N]`, plus z U^T and the bias, where `prepared.weight` is U^T alone."""
    m = x.shape[0]
    z_slices = split(m, len(prepared.v_tiles), prepared.k).slices
    addend = Addend(partial, slices)
    prepared = prepared._replace(k=0)
    if m == 1:
        return "gemv", plan_gemv(x, prepared, y, bias, target, z=z, z_slices=z_slices, addend=addend)
    return "dot", plan_dot(x, prepared, y, bias, target, z=z, z_slices=z_slices, addend=addend, dot_dtype=dot_dtype)


def plan_gemv(
    x: Tensor,
    prepared: Prepared,
    out: Tensor,
    bias: Tensor | None,
    target: str,
    *,
    z: Tensor | None = None,
    z_slices: int = 0,
    rest: bool = False,
    addend: Addend | None = None,
) -> Launch:
    """One token. `out`: y, or fp32 partial sums when K is split or for `rest` (unselected inputs).

    `z`: partial sums of the branch's z, `z_slices` of them.
    """
    chosen = gemv_split(len(prepared.tiles), prepared.k)
    arguments = _arguments(x, prepared, out, bias, z, addend, chosen)
    del arguments["stride_w"]
    bf16 = prepared.weight.dtype == torch.bfloat16
    weight = prepared.weight.view(torch.int32) if bf16 else prepared.weight
    return Launch(
        grid=(len(prepared.tiles), chosen.slices),
        arguments={**arguments, "x": _fours(x), "weight": weight},
        constants={
            **_constants(prepared, bias, z_slices, rest, addend, chosen),
            "BF16": bf16,
            "STRIDE": weight.stride(0),
            "UNROLL": gemv_unroll(prepared.k // chosen.slices),
            "BLOCK_K": GEMV_THREADS * 8 // TILE,
            "BLOCK_N": TILE,
        },
        num_warps=GEMV_THREADS // _lanes(target),
    )


def _fours(x: Tensor) -> Tensor:
    """Inputs `[1, K]` as int64 of four, zero-padded; copied where they do not lie so."""
    if x.shape[1] % 4 or x.storage_offset() % 4:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 4)).clone()
    return x.view(torch.int64)


def plan_dot(
    x: Tensor,
    prepared: Prepared,
    out: Tensor,
    bias: Tensor | None,
    target: str,
    *,
    z: Tensor | None = None,
    z_slices: int = 0,
    rest: bool = False,
    addend: Addend | None = None,
    dot_dtype: torch.dtype | None = None,
) -> Launch:
    """2 to 64 tokens. `dot_dtype`: type of the products, x's by default (Triton's interpreter cannot do bf16)."""
    import triton.language as tl

    m = x.shape[0]
    chosen = dot_split(m, len(prepared.tiles), prepared.k)
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return Launch(
        grid=(len(prepared.tiles), chosen.slices),
        arguments={**_arguments(x, prepared, out, bias, z, addend, chosen), "M": m, "stride_x": x.stride(0)},
        constants={
            **_constants(prepared, bias, z_slices, rest, addend, chosen),
            "DOT": types[dot_dtype or x.dtype],
            "BLOCK_M": 16 if m <= 16 else 32 if m <= 32 else 64,
            "BLOCK_K": 128 if m <= 32 else 64,
            "BLOCK_N": TILE,
            "BLOCK_R": 16 if prepared.rank <= 16 else 32,
            "TOPK": prepared.counts is not None,
        },
    )


def plan_reduce(partial: Tensor, bias: Tensor | None, y: Tensor, slices: int) -> Launch:
    """y = the sum of `partial[slices, M, N]` in order, plus the bias."""
    m, n = y.shape
    return Launch(
        grid=(-(-n // REDUCE_COLUMNS), m),
        arguments={"partial": partial, "bias": y if bias is None else bias, "y": y, "M": m, "N": n},
        constants={"BIAS": bias is not None, "SLICES": slices, "BLOCK_N": REDUCE_COLUMNS},
        num_warps=2,
    )


def _arguments(
    x: Tensor,
    prepared: Prepared,
    out: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    addend: Addend | None,
    chosen: Split,
) -> dict[str, Any]:
    """What `gemv` and `dot` share. Absent tensors are stood in for by present ones; the constants turn them off."""
    assert prepared.thresholds is not None  # `with_cuts` has made room, where there are none
    return {
        "x": x,
        "weight": prepared.weight,
        "thresholds": prepared.thresholds,
        "norms": prepared.thresholds if prepared.norms is None else prepared.norms,
        "z": prepared.thresholds if z is None else z,
        "tiles": prepared.tiles,
        "bias": prepared.thresholds if bias is None else bias,
        "addend": prepared.thresholds if addend is None else addend.sums,
        "out": out,
        "N": prepared.n,
        "K": prepared.k,
        "RANK": prepared.rank,
        "stride_w": prepared.weight.stride(0),
        "slice_k": chosen.slice_k,
    }


def _constants(
    prepared: Prepared, bias: Tensor | None, z_slices: int, rest: bool, addend: Addend | None, chosen: Split
) -> dict[str, Any]:
    return {
        "PARTS": len(prepared.parts),
        "NORMS": prepared.norms is not None,
        "BIAS": bias is not None,
        "REST": rest,
        "PARTIAL": rest or chosen.slices > 1,
        "Z_SLICES": z_slices,
        "ADDENDS": 0 if addend is None else addend.slices,
    }


def _lanes(target: str) -> int:
    return 64 if target.startswith("gfx9") else 32
