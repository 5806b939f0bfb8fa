"""`halfweight::group_int4_gpu`: group-sparse int4 linears (GQSA) on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import trust
from ..formats import groups
from ..formats.groups import KeptGroups
from ..launch import NVIDIA, Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from .layout import ROWS, Prepared, prepare, prepared_shapes
from .plan import EXPAND_FROM, SIMT_MOST, can_run, choose, plan_expand, plan_fragment, plan_simt

__all__ = ["KERNELS", "PLANS", "can_run", "choose", "expand", "linear", "register"]

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]
PLANS: Mapping[str, Plan] = {"fragment": plan_fragment, "simt": plan_simt}
SCRATCH_NUMBERS = 2**25  # of an expanded weight at a time: 64 MiB in 16 bits
EXAMPLE_GROUP = 16


def linear(
    x: Tensor,
    prepared: Prepared,
    bias: Tensor | None = None,
    *,
    kernel: str | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """`y[..., N]` of `x[..., K]` on a GPU.

    `kernel` names one of `choose`'s answers; by default the choice is made for the device, with inline assembly only
    after it was checked there. `scratch`: room for `expand` in x's dtype: at least a tile of 16 rows, or the whole
    weight when it is balanced over the layer; allocated when None.
    """
    tokens = pad_columns(x.reshape(-1, prepared.columns), prepared.group)
    m, target = tokens.shape[0], device_target(x.device)
    asm, _ = trust.may_run("group_int4.fragment", x.device, inline_asm=True, tokens=m)
    kernel = kernel or choose(m, prepared.rows, prepared.columns, x.dtype, target, asm)
    y = tokens.new_empty((m, prepared.rows))
    if kernel == "expand":
        expand_and_multiply(tokens[:, : prepared.columns], prepared, bias, y, target, scratch)
    elif m:
        _BY_FUNCTION[kernel].run(PLANS[kernel](tokens, prepared, y, bias, target))
    return y.reshape(*x.shape[:-1], prepared.rows)


def pad_columns(x: Tensor, group: int) -> Tensor:
    """Contiguous `x[M, K]` with zeros up to whole groups and 32 bytes: kernels read whole groups."""
    return F.pad(x, (0, -x.shape[1] % lcm(group, 16))).contiguous()


def expand_and_multiply(
    x: Tensor, prepared: Prepared, bias: Tensor | None, y: Tensor, target: str, scratch: Tensor | None = None
) -> None:
    """`y[M, N] = x[M, K] W^T + bias`, expanding as many rows of W at a time as `scratch` holds."""
    tiles, tile = -(-prepared.rows // ROWS), ROWS * prepared.columns
    whole = prepared.order is not None
    if scratch is None:
        scratch = x.new_empty(scratch_numbers(prepared))
    step = tiles if whole else scratch.numel() // tile
    for first in range(0, tiles, step):
        part = prepared if whole else rows_of(prepared, first, first + step)
        weight = scratch.flatten()[: part.rows * part.columns].view(part.rows, part.columns)
        expand(part, weight, target)
        columns = slice(ROWS * first, ROWS * first + part.rows)
        y[:, columns] = F.linear(x, weight, None if bias is None else bias[columns])


def scratch_numbers(prepared: Prepared) -> int:
    """Elements of `scratch` that `linear` has a use for."""
    tiles, tile = -(-prepared.rows // ROWS), ROWS * prepared.columns
    return tile * (tiles if prepared.order is not None else min(tiles, max(1, SCRATCH_NUMBERS // tile)))


def expand(prepared: Prepared, weight: Tensor, target: str) -> None:
    """Write the dense weight to `weight` `[N, K]`."""
    _BY_FUNCTION["expand"].run(plan_expand(prepared, weight.zero_(), target))


def rows_of(prepared: Prepared, first: int, stop: int) -> Prepared:
    """Tiles `first` to `stop` (exclusive) of a weight balanced by row, without an expert axis, sharing memory."""
    return prepared._replace(
        codes=prepared.codes[first:stop],
        scales=prepared.scales[first:stop],
        index=prepared.index[first:stop],
        rows=min(prepared.rows, ROWS * stop) - ROWS * first,
    )


def register() -> None:
    """Define `halfweight::group_int4_gpu`, idempotently."""
    register_operator(
        "group_int4_gpu(Tensor x, Tensor codes, Tensor scales, Tensor index, Tensor? order, Tensor? unit_start,"
        " Tensor? worker_start, Tensor? row_start, int group, int rows, int columns, int kept, Tensor? bias) -> Tensor",
        {"CUDA": lambda x, *fields: linear(x, Prepared(*fields[:-1]), fields[-1])},
        lambda x, *fields: x.new_empty((*x.shape[:-1], fields[8])),
    )


# --- facts ---


def example_kept(k: int) -> int:
    """Half of the groups."""
    return -(-k // EXAMPLE_GROUP) // 2


def example_weight(shape: Shape) -> Prepared:
    """A half-dense weight of `shape` on the meta device, groups of 16, balanced by row."""
    kept = example_kept(shape.k)
    sizes = prepared_shapes((shape.n, shape.k), group_size=EXAMPLE_GROUP, kept=kept)
    codes, scales, index = (
        torch.empty(sizes[key], dtype=torch.int32, device="meta") for key in ("codes", "scales", "index")
    )
    return Prepared(codes, scales, index, None, None, None, None, EXAMPLE_GROUP, shape.n, shape.k, kept)


def sample_weight(shape: Shape, seed: int = 0) -> Prepared:
    """The same with random content on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    kept, total = example_kept(shape.k), -(-shape.k // EXAMPLE_GROUP)
    entries = (shape.n, kept)
    numbers = torch.rand(shape.n, total, generator=generator).argsort(-1)[:, :kept].sort(-1).values
    packed = groups.pack(
        KeptGroups(
            torch.randint(16, (*entries, EXAMPLE_GROUP), generator=generator, dtype=torch.uint8),
            (torch.rand(entries, generator=generator) + 0.5).half(),
            torch.randint(16, entries, generator=generator, dtype=torch.uint8),
            numbers,
        ),
        shape.k,
    )
    return prepare(packed, shape.k)


def _example(shape: Shape, dtype: torch.dtype, target: str, *, name: str, real: bool) -> Launch:
    weight = sample_weight(shape) if real else example_weight(shape)
    device = "cpu" if real else "meta"
    if name == "expand":
        return plan_expand(weight, torch.zeros((shape.n, shape.k), dtype=dtype, device=device), target)
    x = torch.empty((shape.m, shape.k), dtype=dtype, device=device)
    if real:
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    x = pad_columns(x, EXAMPLE_GROUP)
    return PLANS[name](x, weight, x.new_empty((shape.m, shape.n)), None, target)


def _kernel(name: str, m_range: tuple[int, int], **more: Any) -> Kernel:
    def stored(shape: Shape, names: tuple[str, ...] = ("codes", "scales", "index")) -> int:
        sizes = prepared_shapes((shape.n, shape.k), group_size=EXAMPLE_GROUP, kept=example_kept(shape.k))
        return sum(4 * torch.Size(sizes[key]).numel() for key in names)

    def activations(shape: Shape, dtype: torch.dtype) -> int:
        if name == "expand":
            return shape.n * example_kept(shape.k) * EXAMPLE_GROUP * dtype.itemsize
        return shape.m * (shape.k + shape.n) * dtype.itemsize

    file_bytes = EXAMPLE_GROUP // 2 + 4
    return Kernel(
        name=f"group_int4.{name}",
        op="group_int4",
        function=f"group_int4.kernel:{name}",
        example=partial(_example, name=name, real=False),
        bytes=lambda shape, dtype: stored(shape) + activations(shape, dtype),
        minimum_bytes=lambda shape, dtype: shape.n * example_kept(shape.k) * file_bytes + activations(shape, dtype),
        weights=lambda shape: shape.n * example_kept(shape.k) * EXAMPLE_GROUP,
        weight_bytes=lambda shape, dtype: stored(shape) if name == "fragment" else stored(shape, ("codes",)),
        m_range=m_range,
        sample=partial(_example, name=name, real=True),
        **more,
    )


KERNELS = (
    _kernel(
        "fragment",
        (1, EXPAND_FROM - 1),
        budget={torch.float16: 3.45, torch.bfloat16: 3.65},
        targets=NVIDIA,
        inline_asm=True,
        loop_is_clean=True,
    ),
    _kernel("simt", (1, SIMT_MOST), budget={torch.float16: 11.2, torch.bfloat16: 11.2}, loop_is_clean=True),
    _kernel("expand", (EXPAND_FROM, 2**20), budget=None),
)
_BY_FUNCTION: Mapping[str, Kernel] = {kernel.function.partition(":")[2]: kernel for kernel in KERNELS}
