"""`halfweight::input_select_int4_gpu`: input-selected int4 linears on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..formats import groups, integers
from ..formats.groups import Groups
from ..formats.input_select import InputSelection
from ..formats.integers import Integers
from ..input_select import layout as select_layout
from ..input_select import op as select_op
from ..input_select import reference as select_reference
from ..launch import Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from . import layout
from .layout import Prepared
from .plan import (
    MATMUL_FROM,
    Lists,
    can_run,
    choose,
    chunk_size,
    lists,
    plan,
    plan_dot,
    plan_expand,
    plan_gemv,
    plan_pick,
)

__all__ = ["KERNELS", "can_run", "choose", "expand", "linear", "plan", "plan_expand", "register"]

EXAMPLE_GROUP = 128
EXAMPLE_KEPT_GROUP = 32  # of which half are kept


def linear(
    x: Tensor,
    prepared: Prepared,
    bias: Tensor | None = None,
    *,
    masked: bool = True,
    scratch: Tensor | None = None,
) -> Tensor:
    """`y[..., N]` of `x[..., K]` on a GPU; `masked=False` uses every input (a dense prefill) and no branch.

    `scratch`: at least N * K elements of x's dtype, where many tokens' dense weight goes; allocated when missing.
    """
    n, k = prepared.select.n, prepared.select.k
    tokens = x.reshape(-1, k).contiguous()
    m = tokens.shape[0]
    if not masked or choose(m) == "matmul":
        _, selection = select_layout.restore(prepared.select._replace(k=0))
        weight = expand(prepared, x.dtype, scratch)
        y = select_reference.linear(
            *(tokens, weight, selection, bias),
            parts=prepared.select.parts,
            masked=masked,
            cuts=select_op.token_cuts(tokens, prepared.select) if masked else None,
        )
    else:
        y = tokens.new_empty((m, n))
        for name, launch in plan(tokens, prepared, y, bias, device_target(x.device)) if m else ():
            _BY_NAME[name].run(launch)
    return y.reshape(*x.shape[:-1], n)


def expand(prepared: Prepared, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """W^T `[K, N]` on its GPU, rounded once to `dtype`; see `linear` for `scratch`."""
    size = scratch_numbers(prepared)
    if scratch is None:
        scratch = torch.empty(size, dtype=dtype, device=prepared.codes.device)
    weight = scratch[:size].view(prepared.select.k, prepared.select.n)
    kind = "group_" if prepared.entries is not None else ""
    _BY_NAME[f"input_select_int4.{kind}expand"].run(plan_expand(prepared, weight, device_target(weight.device)))
    return weight


def scratch_numbers(prepared: Prepared) -> int:
    """Elements of `scratch` that `linear` has a use for."""
    return prepared.select.k * prepared.select.n


def register() -> None:
    """Define `halfweight::input_select_int4_gpu`, idempotently."""
    register_operator(
        "input_select_int4_gpu(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? entries, Tensor tiles,"
        " int group_size, int stored_group_size, int segments, int kept, Tensor u, Tensor? thresholds,"
        " Tensor? counts, Tensor? norms, Tensor? v, Tensor u_tiles, Tensor v_tiles, Tensor(a!) workspace, int n, int k,"
        " int rank, int[] parts, Tensor? bias, bool masked=True) -> Tensor",
        {"CUDA": _operator},
        lambda x, *rest, **masked: x.new_empty((*x.shape[:-1], rest[17])),
    )


def _operator(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    entries: Tensor | None,
    tiles: Tensor,
    group_size: int,
    stored_group_size: int,
    segments: int,
    kept: int,
    u: Tensor,
    thresholds: Tensor | None,
    counts: Tensor | None,
    norms: Tensor | None,
    v: Tensor | None,
    u_tiles: Tensor,
    v_tiles: Tensor,
    workspace: Tensor,
    n: int,
    k: int,
    rank: int,
    parts: Sequence[int],
    bias: Tensor | None,
    masked: bool = True,
) -> Tensor:
    select = select_layout.Prepared(
        *(u, thresholds, counts, norms, v, u_tiles, v_tiles, workspace, n, k, rank, tuple(parts))
    )
    prepared = Prepared(codes, scales, zeros, entries, tiles, select, group_size, stored_group_size, segments, kept)
    return linear(x, prepared, bias, masked=masked)


# --- facts ---


def example_prepared(shape: Shape, dtype: torch.dtype, *, sparse: bool, device: str = "meta") -> Prepared:
    """A random linear of one part, without a branch, that selects every input: for compiling and trying kernels."""
    n, k = shape.n, shape.k
    packed: list[Integers] | list[Groups]
    if sparse:
        kept = _kept(n)
        numbers = torch.arange(kept, device=device) * groups.count_groups(n, EXAMPLE_KEPT_GROUP) // max(1, kept)
        shapes = groups.packed_shapes((k, n), group_size=EXAMPLE_KEPT_GROUP, kept=kept)
        index = (numbers | 7 << 12).to(torch.int16).expand(shapes["index"]).contiguous()
        packed = [Groups(_random_bytes(shapes["codes"], device), _random_scales(shapes["scales"], device), index)]
    else:
        shapes = integers.packed_shapes((k, n), bits=4, group_size=EXAMPLE_GROUP, symmetric=True)
        codes = _random_bytes(shapes["codes"], device)
        packed = [Integers(codes, _random_scales(shapes["scales"], device), None)]
    selection = InputSelection(torch.zeros(1, dtype=torch.int32, device=device))
    size = EXAMPLE_KEPT_GROUP if sparse else EXAMPLE_GROUP
    return layout.prepare(packed, selection, (n,), group_size=size)


def steps(shape: Shape, dtype: torch.dtype, target: str) -> list[tuple[str, Launch]]:
    """The launches of a dense int4 linear without a branch, in order, by the kernels' names, on meta tensors."""
    x = torch.empty((shape.m, shape.k), dtype=dtype, device="meta")
    return plan(x, example_prepared(shape, dtype, sparse=False), x.new_empty((shape.m, shape.n)), None, target)


def _kept(n: int) -> int:
    return groups.count_groups(n, EXAMPLE_KEPT_GROUP) // 2


def _random_bytes(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, device=device)


def _random_scales(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.rand(shape, device=device).half().view(torch.int16)


def _example(shape: Shape, dtype: torch.dtype, target: str, *, kernel: str, device: str = "meta") -> Launch:
    """The launch of one step of `plan` in which every input is selected by every token."""
    prepared = example_prepared(shape, dtype, sparse=kernel.startswith("group"), device=device)
    if kernel.endswith("expand"):
        return plan_expand(prepared, torch.empty((shape.k, shape.n), dtype=dtype, device=device), target)
    x = torch.randn((shape.m, shape.k), device=device).to(dtype)
    shared = lists(prepared, shape.m, dtype)
    if kernel == "pick":
        return plan_pick(x, prepared, shared, target)
    _select_everything(x, prepared, shared)
    if kernel.endswith("gemv"):
        return plan_gemv(prepared, shared, target)
    return plan_dot(x, prepared, shared, target)


def _select_everything(x: Tensor, prepared: Prepared, shared: Lists) -> None:
    """What `pick` would leave."""
    k = x.shape[1]
    chunk = chunk_size(k, len(prepared.tiles))
    chunks = -(-k // chunk)
    row = torch.arange(chunks * chunk, device=x.device)
    shared.rows[: chunks * chunk] = row.to(torch.int32)
    shared.counts[:chunks] = (k - row[::chunk]).clamp(max=chunk).to(torch.int32)
    padded = torch.nn.functional.pad(x, (0, chunks * chunk - k))
    shared.values[: padded.numel()] = padded.unflatten(1, (chunks, chunk)).transpose(0, 1).flatten()


def _weights(shape: Shape, *, kernel: str) -> int:
    """Of the file: kept ones."""
    if kernel == "pick":
        return 0
    return shape.k * (_kept(shape.n) * EXAMPLE_KEPT_GROUP if kernel.startswith("group") else shape.n)


def _weight_bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    """Of codes, with every input selected; otherwise the share of rows that some token uses."""
    if kernel.startswith("group") or kernel == "pick":
        return _weights(shape, kernel=kernel) // 2
    return shape.k * -(-shape.n // layout.TILE) * layout.TILE // 2


def _bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    """With every input selected. Lists and sums of the chunks included."""
    if kernel == "pick":
        return _other_bytes(shape, dtype, kernel=kernel)
    entries, tiles = shape.k * _kept(shape.n), -(-shape.n // _width(kernel))
    sparse = 2 * entries + -(-entries // 2) + 4 * tiles * shape.k
    scales = sparse if kernel.startswith("group") else 2 * shape.k * tiles
    return _weight_bytes(shape, dtype, kernel=kernel) + scales + _other_bytes(shape, dtype, kernel=kernel)


def _minimum_bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    """As `_bytes`, with the weights as the files hold them."""
    if kernel == "pick":
        return _other_bytes(shape, dtype, kernel=kernel)
    scales = 4 * _kept(shape.n) if kernel.startswith("group") else 2 * -(-shape.n // EXAMPLE_GROUP)
    return _weights(shape, kernel=kernel) // 2 + shape.k * scales + _other_bytes(shape, dtype, kernel=kernel)


def _other_bytes(shape: Shape, dtype: torch.dtype, *, kernel: str) -> int:
    """Besides the weight."""
    m, n, k = shape
    tiles = -(-n // _width(kernel))
    table, chunks = min(32, 16 * tiles), -(-k // chunk_size(k, tiles))
    if kernel.endswith("expand"):
        return k * n * dtype.itemsize + table
    picked = 4 * k + 16 * -(-chunks // 4) + m * k * dtype.itemsize
    if kernel == "pick":
        return picked + m * k * dtype.itemsize + 4
    return picked + table + 4 * chunks * m * n


def _width(kernel: str) -> int:
    """Columns of a tile of the example."""
    return layout.tile_width(EXAMPLE_KEPT_GROUP if kernel.startswith("group") else EXAMPLE_GROUP)


def _kernel(name: str, m_range: tuple[int, int], budget: dict[torch.dtype, float] | None) -> Kernel:
    return Kernel(
        name=f"input_select_int4.{name}",
        op="input_select_int4",
        function=f"input_select_int4.kernel:{name.removeprefix('group_')}",
        example=partial(_example, kernel=name),
        bytes=partial(_bytes, kernel=name),
        minimum_bytes=partial(_minimum_bytes, kernel=name),
        weights=partial(_weights, kernel=name),
        weight_bytes=partial(_weight_bytes, kernel=name),
        budget=budget,
        m_range=m_range,
        loop_is_clean=name.endswith("gemv"),
        sample=partial(_example, kernel=name, device="cpu"),
    )


KERNELS = (
    _kernel("pick", (1, MATMUL_FROM - 1), None),
    _kernel("gemv", (1, 1), {torch.float16: 5.0, torch.bfloat16: 5.0}),
    _kernel("dot", (2, MATMUL_FROM - 1), None),
    _kernel("group_gemv", (1, 1), {torch.float16: 7.5, torch.bfloat16: 7.5}),
    _kernel("group_dot", (2, MATMUL_FROM - 1), None),
    _kernel("expand", (MATMUL_FROM, 2**20), None),
    _kernel("group_expand", (MATMUL_FROM, 2**20), None),
)
_BY_NAME = {kernel.name: kernel for kernel in (*KERNELS, *select_op.KERNELS)}
