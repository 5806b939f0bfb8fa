"""`halfweight::input_select_gpu`: input-selected 16-bit linears on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..formats import input_select
from ..formats.bits import to_bits
from ..formats.input_select import InputSelection
from ..launch import Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from . import layout
from .layout import Prepared, count_tiles
from .plan import (
    MATMUL_FROM,
    can_run,
    choose,
    plan,
    plan_cut,
    plan_dot,
    plan_gemv,
    plan_reduce,
    plan_rest,
    with_cuts,
    workspaces,
)
from .reference import selected
from .split import dot_split, gemv_split

__all__ = [
    "KERNELS",
    "can_run",
    "choose",
    "linear",
    "matmul",
    "plan",
    "plan_cut",
    "plan_dot",
    "plan_gemv",
    "plan_reduce",
    "plan_rest",
    "register",
]

EXAMPLE_RANK = 64


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None, *, masked: bool = True) -> Tensor:
    """`y[..., N]` of `x[..., K]` on a GPU; `masked=False` uses every input (a dense prefill) and no branch."""
    tokens = x.reshape(-1, prepared.k).contiguous()
    m = tokens.shape[0]
    if not masked or choose(m) == "matmul":
        y = matmul(tokens, prepared, bias, masked=masked)
    else:
        y = tokens.new_empty((m, prepared.n))
        for name, launch in plan(tokens, prepared, y, bias, device_target(x.device)) if m else ():
            _KERNEL_OF[name].run(launch)
    return y.reshape(*x.shape[:-1], prepared.n)


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None, *, masked: bool = True) -> Tensor:
    """The same for many tokens `x[M, K]`: masked x times the dense weight, and the branch as two matmuls."""
    selection = layout.selection_of(prepared)
    cuts = token_cuts(x, prepared) if masked else None
    ranks = (prepared.rank,) * len(prepared.parts)
    columns = layout.padded_columns(prepared.parts)
    v_columns = layout.padded_columns(ranks)
    blocks = []
    for part, size in enumerate(prepared.parts):
        weight = prepared.weight[:, columns[part]][:, :size]
        if not masked:
            blocks.append(x @ weight[: prepared.k])
            continue
        used = selected(x, selection, part, cuts)
        block = torch.where(used, x, 0) @ weight[: prepared.k]
        if prepared.v is not None:
            z = torch.where(used, 0, x) @ prepared.v[:, v_columns[part]][:, : prepared.rank]
            block = block.addmm_(z, weight[prepared.k :])
        blocks.append(block)
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    return y if bias is None else y + bias


def token_cuts(x: Tensor, prepared: Prepared) -> Tensor | None:
    """The tokens' own thresholds `[M, P]` for `x[M, K]` on a GPU; None where all have the same (and on a CPU, where
    the reference finds them)."""
    if x.device.type != "cuda":
        return None
    steps, prepared = with_cuts(x, prepared, device_target(x.device))
    for name, launch in steps:
        _KERNEL_OF[name].run(launch)
    return prepared.thresholds if steps else None


def register() -> None:
    """Define `halfweight::input_select_gpu`, idempotently."""
    register_operator(
        "input_select_gpu(Tensor x, Tensor weight, Tensor? thresholds, Tensor? counts, Tensor? norms, Tensor? v,"
        " Tensor tiles, Tensor v_tiles, Tensor(a!) workspace, int n, int k, int rank, int[] parts, Tensor? bias,"
        " bool masked=True) -> Tensor",
        {"CUDA": _operator},
        lambda x, *rest, **masked: x.new_empty((*x.shape[:-1], rest[8])),
    )


def _operator(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor | None,
    counts: Tensor | None,
    norms: Tensor | None,
    v: Tensor | None,
    tiles: Tensor,
    v_tiles: Tensor,
    workspace: Tensor,
    n: int,
    k: int,
    rank: int,
    parts: Sequence[int],
    bias: Tensor | None,
    masked: bool = True,
) -> Tensor:
    prepared = Prepared(weight, thresholds, counts, norms, v, tiles, v_tiles, workspace, n, k, rank, tuple(parts))
    return linear(x, prepared, bias, masked=masked)


# --- facts ---


def example_prepared(
    shape: Shape, dtype: torch.dtype, *, rank: int = 0, threshold: float = 0.0, topk: bool = False, device: str = "meta"
) -> Prepared:
    """A random linear of one part, for compiling (on the meta device) and trying kernels; with `topk`, a token reads
    half of its inputs."""
    tensors: dict[str, Tensor | None] = {
        name: torch.randn(size, device=device).to(dtype)
        for name, size in input_select.packed_shapes((shape.n, shape.k), rank=rank).items()
    }
    tensors["thresholds"] = to_bits(torch.full((1,), threshold, device=device))
    if topk:
        count = torch.full((1,), max(1, shape.k // 2), dtype=torch.int32, device=device)
        tensors |= {"thresholds": None, "counts": count}
    weight = torch.randn((shape.k, shape.n), device=device).to(dtype)
    return layout.prepare(weight, InputSelection(**tensors))


def steps(shape: Shape, dtype: torch.dtype, target: str) -> list[tuple[str, Launch]]:
    """The launches of a linear of this shape without a branch, in order, by the kernels' names, on meta tensors."""
    x = torch.empty((shape.m, shape.k), dtype=dtype, device="meta")
    launches = plan(x, example_prepared(shape, dtype), x.new_empty((shape.m, shape.n)), None, target)
    return [(f"input_select.{name}", launch) for name, launch in launches]


def _example(shape: Shape, dtype: torch.dtype, target: str, *, kernel: str, device: str = "meta") -> Launch:
    """The launch of one step of `plan` that reads every row, without a branch; `rest_` ones into EXAMPLE_RANK."""
    rest = kernel.startswith("rest")
    x = torch.randn((shape.m, shape.k), device=device).to(dtype)
    if kernel == "cut":
        ((_, launch),), _ = with_cuts(x, example_prepared(shape, dtype, topk=True, device=device), target)
        return launch
    prepared = example_prepared(
        shape, dtype, rank=EXAMPLE_RANK if rest else 0, threshold=1e9 if rest else 0.0, device=device
    )
    y = torch.empty((shape.m, shape.n), dtype=dtype, device=device)
    z, partial_sums = workspaces(prepared, shape.m)
    if rest:
        return plan_rest(x, prepared, z, target)[1]
    slices = _slices(shape)
    if kernel == "reduce":
        return plan_reduce(partial_sums, None, y, slices)
    out = y if slices == 1 else partial_sums
    return (plan_gemv if kernel == "gemv" else plan_dot)(x, prepared, out, None, target)


def _slices(shape: Shape, rank: int = 0) -> int:
    tiles = count_tiles((rank or shape.n,))
    return (gemv_split(tiles, shape.k) if shape.m == 1 else dot_split(shape.m, tiles, shape.k)).slices


def _weights(shape: Shape, *, kernel: str) -> int:
    return 0 if kernel in ("cut", "reduce") else shape.k * (EXAMPLE_RANK if kernel.startswith("rest") else shape.n)


def _weight_bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    """With every input selected (not selected, for `rest`); otherwise the share of rows that some token uses."""
    columns = EXAMPLE_RANK if kernel.startswith("rest") else shape.n
    return 0 if kernel in ("cut", "reduce") else shape.k * count_tiles((columns,)) * layout.TILE * dtype.itemsize


def _bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    rest = kernel.startswith("rest")
    if kernel == "cut":
        return shape.m * (shape.k * dtype.itemsize + 4) + 4
    if kernel == "reduce":
        return _slices(shape) * shape.m * shape.n * 4 + shape.m * shape.n * dtype.itemsize
    slices = _slices(shape, EXAMPLE_RANK if rest else 0)
    columns = EXAMPLE_RANK if rest else shape.n
    out = shape.m * columns * (4 * slices if rest or slices > 1 else dtype.itemsize)
    return _weight_bytes(shape, dtype, kernel=kernel) + shape.m * shape.k * dtype.itemsize + 4 + out


def _minimum_bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    return (
        _bytes(shape, dtype, kernel=kernel)
        - _weight_bytes(shape, dtype, kernel=kernel)
        + (_weights(shape, kernel=kernel) * dtype.itemsize)
    )


def _kernel(name: str, function: str, m_range: tuple[int, int], budget: dict[torch.dtype, float] | None) -> Kernel:
    return Kernel(
        name=f"input_select.{name}",
        op="input_select",
        function=f"input_select.kernel:{function}",
        example=partial(_example, kernel=name),
        bytes=partial(_bytes, kernel=name),
        minimum_bytes=partial(_minimum_bytes, kernel=name),
        weights=partial(_weights, kernel=name),
        weight_bytes=partial(_weight_bytes, kernel=name),
        budget=budget,
        m_range=m_range,
        loop_is_clean=function == "gemv",
        sample=partial(_example, kernel=name, device="cpu"),
    )


KERNELS = (
    _kernel("gemv", "gemv", (1, 1), {torch.float16: 3.9, torch.bfloat16: 3.75}),
    _kernel("dot", "dot", (2, MATMUL_FROM - 1), None),
    _kernel("rest_gemv", "gemv", (1, 1), None),
    _kernel("rest_dot", "dot", (2, MATMUL_FROM - 1), None),
    _kernel("reduce", "reduce", (1, MATMUL_FROM - 1), None),
    _kernel("cut", "cut", (1, 2**20), None),
)
_KERNEL_OF = {"gemv": KERNELS[0], "dot": KERNELS[1], "reduce": KERNELS[4], "cut": KERNELS[5]}
