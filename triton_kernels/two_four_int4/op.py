"""`halfweight::two_four_int4_gpu`: 2:4 linears with int4 values on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import trust
from ..formats import two_four_int4
from ..formats.integers import Quantized
from ..launch import NVIDIA, Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from .layout import Prepared, packed_bytes, prepare, prepared_shapes
from .plan import EXPAND_FROM, GEMV_TOKENS, MMA_TOKENS, can_run, choose, plan_dot, plan_expand, plan_mma_sp, plan_select

__all__ = ["KERNELS", "PLANS", "can_run", "choose", "expand", "linear", "register"]

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]

EXAMPLE_GROUP = 128


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None, *, scratch: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` -> `[..., N]` on a GPU, x in float16 or bfloat16.

    `scratch`: at least N * K elements of x's dtype, where many tokens' dense weight goes; allocated when missing.
    """
    tokens = x.reshape(-1, prepared.k).contiguous()
    m, target = len(tokens), device_target(x.device)
    asm, _ = trust.may_run("two_four_int4.mma_sp", x.device, inline_asm=True, tokens=m)
    name = choose(m, prepared.n, prepared.k, x.dtype, target, asm)
    if name == "expand":
        y = F.linear(tokens, expand(prepared, x.dtype, scratch), bias)
    else:
        if tokens.data_ptr() % 16:
            tokens = tokens.clone()
        y = tokens.new_empty((m, prepared.n))
        if m:
            _KERNEL_OF[name].run(PLANS[name](tokens, prepared, y, bias, target))
    return y.reshape(*x.shape[:-1], prepared.n)


def expand(prepared: Prepared, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """The dense weight `[N, K]` on its GPU, rounded once to `dtype`; see `linear` for `scratch`."""
    size = scratch_numbers(prepared)
    if scratch is None:
        scratch = torch.empty(size, dtype=dtype, device=prepared.codes.device)
    dense = scratch[:size].view(prepared.n, prepared.k)
    _KERNEL_OF["expand"].run(plan_expand(prepared, dense, device_target(dense.device)))
    return dense


def scratch_numbers(prepared: Prepared) -> int:
    """Elements of `scratch` that `linear` has a use for."""
    return prepared.n * prepared.k


def register() -> None:
    """Define `halfweight::two_four_int4_gpu`, idempotently."""

    def operator(x: Tensor, *rest: Any) -> Tensor:
        return linear(x, Prepared(*rest[:-1]), rest[-1])

    register_operator(
        "two_four_int4_gpu(Tensor x, Tensor codes, Tensor metadata, Tensor scales, Tensor? zeros, int group, int n,"
        " int k, Tensor? bias) -> Tensor",
        {"CUDA": operator},
        lambda x, codes, metadata, scales, zeros, group, n, k, bias: x.new_empty((*x.shape[:-1], n)),
    )


def sample_weight(shape: Shape, *, group_size: int = EXAMPLE_GROUP, symmetric: bool = True, seed: int = 0) -> Prepared:
    """A random weight of `shape` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    size, count = (shape.n, shape.k), -(-shape.k // group_size)
    codes = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (shape.n, count), generator=generator, dtype=torch.uint8)
    scales = torch.rand(shape.n, count, generator=generator).half()
    mask = (torch.rand(shape.n, shape.k // 4, 4, generator=generator).argsort(-1) < 2).flatten(-2)
    packed = two_four_int4.pack(Quantized(codes, scales, None if symmetric else zeros), mask, group_size=group_size)
    return prepare(packed, group_size=group_size, k=shape.k)


def example_weight(shape: Shape) -> Prepared:
    """A symmetric weight of `shape` on the meta device."""
    sizes = prepared_shapes(shape.n, shape.k, group=EXAMPLE_GROUP, symmetric=True)
    codes, metadata, scales = (torch.empty(size, dtype=torch.int32, device="meta") for size in sizes.values())
    return Prepared(codes, metadata, scales, None, EXAMPLE_GROUP, shape.n, shape.k)


def _example(shape: Shape, dtype: torch.dtype, target: str, *, plan: Plan) -> Launch:
    x = torch.empty((shape.m, shape.k), dtype=dtype, device="meta")
    return plan(x, example_weight(shape), x.new_empty((shape.m, shape.n)), None, target)


def _sample(shape: Shape, dtype: torch.dtype, target: str, *, plan: Plan) -> Launch:
    x = torch.randn((shape.m, shape.k), generator=torch.Generator().manual_seed(1)).to(dtype)
    return plan(x, sample_weight(shape), x.new_empty((shape.m, shape.n)), None, target)


def _plan_expand(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    return plan_expand(prepared, torch.empty((prepared.n, prepared.k), dtype=x.dtype, device=x.device), target)


def _stored_bytes(shape: Shape) -> dict[str, int]:
    sizes = prepared_shapes(shape.n, shape.k, group=EXAMPLE_GROUP, symmetric=True)
    return {name: 4 * torch.Size(size).numel() for name, size in sizes.items()}


def _activation_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.m * (shape.k + shape.n) * dtype.itemsize


def _kernel(
    name: str,
    module: str,
    plan: Plan,
    budget: Mapping[torch.dtype, float] | None,
    m_range: tuple[int, int],
    streamed: tuple[str, ...] = ("codes",),
    **more: Any,
) -> Kernel:
    """`streamed`: the tensors that the kernel loads with `evict_first`."""

    def other_bytes(shape: Shape, dtype: torch.dtype) -> int:
        if name == "expand":
            return shape.n * shape.k * dtype.itemsize
        return _activation_bytes(shape, dtype)

    def packed(shape: Shape) -> int:
        return packed_bytes(shape.n, shape.k, group_size=EXAMPLE_GROUP, symmetric=True)

    return Kernel(
        name=f"two_four_int4.{name}",
        op="two_four_int4",
        function=f"two_four_int4.{module}:{name}",
        example=partial(_example, plan=plan),
        bytes=lambda shape, dtype: sum(_stored_bytes(shape).values()) + other_bytes(shape, dtype),
        minimum_bytes=lambda shape, dtype: packed(shape) + other_bytes(shape, dtype),
        weights=lambda shape: shape.n * shape.k // 2,
        weight_bytes=lambda shape, dtype: sum(_stored_bytes(shape)[tensor] for tensor in streamed),
        budget=budget,
        m_range=m_range,
        sample=partial(_sample, plan=plan),
        **more,
    )


KERNELS = (
    _kernel(
        "select",
        "kernel",
        plan_select,
        {torch.float16: 9.8, torch.bfloat16: 9.8},
        (1, GEMV_TOKENS),
        loop_is_clean=True,
    ),
    _kernel(
        "mma_sp",
        "kernel",
        plan_mma_sp,
        {torch.float16: 3.3, torch.bfloat16: 3.4},
        (1, MMA_TOKENS),
        ("codes", "metadata", "scales"),
        targets=NVIDIA,
        inline_asm=True,
        loop_is_clean=True,
    ),
    _kernel("dot", "dense", plan_dot, None, (GEMV_TOKENS + 1, EXPAND_FROM - 1)),
    _kernel("expand", "dense", _plan_expand, None, (EXPAND_FROM, EXPAND_FROM)),
)
PLANS: Mapping[str, Plan] = {"select": plan_select, "mma_sp": plan_mma_sp, "dot": plan_dot}
_KERNEL_OF = {kernel.name.partition(".")[2]: kernel for kernel in KERNELS}
