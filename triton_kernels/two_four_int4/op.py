"""`halfweight::two_four_int4_gpu`: 2:4 linears with int4 values on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats import two_four_int4
from ..formats.integers import Quantized
from ..launch import NVIDIA, Kernel, Launch, Shape
from .layout import Prepared, packed_bytes, prepare, prepared_shapes
from .plan import GEMV_TOKENS, MMA_TOKENS, can_run, choose, plan_mma_sp, plan_select

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]

EXAMPLE_GROUP = 128


def sample_weight(
    shape: Shape, *, group_size: int = EXAMPLE_GROUP, symmetric: bool = True, seed: int = 0
) -> Prepared:
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


def _stored_bytes(shape: Shape) -> dict[str, int]:
    sizes = prepared_shapes(shape.n, shape.k, group=EXAMPLE_GROUP, symmetric=True)
    return {name: 4 * torch.Size(size).numel() for name, size in sizes.items()}


def _activation_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.m * (shape.k + shape.n) * dtype.itemsize


def _kernel(
    name: str,
    plan: Plan,
    budget: Mapping[torch.dtype, float] | None,
    m_range: tuple[int, int],
    streamed: tuple[str, ...],
    **more: Any,
) -> Kernel:
    """`streamed`: the tensors that the kernel loads with `evict_first`."""
    return Kernel(
        name=f"two_four_int4.{name}",
        op="two_four_int4",
        function=f"two_four_int4.kernel:{name}",
        example=partial(_example, plan=plan),
        bytes=lambda shape, dtype: sum(_stored_bytes(shape).values()) + _activation_bytes(shape, dtype),
        minimum_bytes=lambda shape, dtype: packed_bytes(shape.n, shape.k, group_size=EXAMPLE_GROUP, symmetric=True)
        + _activation_bytes(shape, dtype),
        weights=lambda shape: shape.n * shape.k // 2,
        weight_bytes=lambda shape, dtype: sum(_stored_bytes(shape)[tensor] for tensor in streamed),
        budget=budget,
        m_range=m_range,
        sample=partial(_sample, plan=plan),
        **more,
    )


KERNELS = (
    _kernel("select", plan_select, {torch.float16: 9.8, torch.bfloat16: 9.8}, (1, GEMV_TOKENS), ("codes",), loop_is_clean=True),
    _kernel(
        "mma_sp",
        plan_mma_sp,
        {torch.float16: 3.3, torch.bfloat16: 3.4},
        (1, MMA_TOKENS - 1),
        ("codes", "metadata", "scales"),
        targets=NVIDIA,
        inline_asm=True,
        loop_is_clean=True,
    ),
)
PLANS: Mapping[str, Plan] = {"select": plan_select, "mma_sp": plan_mma_sp}
