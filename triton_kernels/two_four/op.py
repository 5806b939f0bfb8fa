"""`halfweight::two_four_gpu`: 2:4 linears with 16-bit values on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..formats import two_four
from ..launch import EVERY_GPU, NVIDIA, Kernel, Launch, Shape
from .layout import Prepared, packed_bytes, prepare, prepared_shapes
from .plan import GEMV_TOKENS, MMA_TOKENS, can_run, choose, plan_mma_sp, plan_select

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]


def example_weight(shape: Shape, dtype: torch.dtype) -> Prepared:
    """A weight of `shape` on the meta device."""
    sizes = prepared_shapes(shape.n, shape.k)
    fragments, metadata = (torch.empty(size, dtype=torch.int32, device="meta") for size in sizes.values())
    return Prepared(fragments, metadata, shape.n, shape.k, int(dtype == torch.bfloat16))


def sample_weight(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Prepared:
    """A random weight of `shape` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape.n, shape.k // two_four.GROUP, two_four.GROUP, generator=generator)
    kept = torch.rand(dense.shape, generator=generator).argsort(-1) < two_four.KEPT
    return prepare(*two_four.pack((dense * kept).flatten(-2).to(dtype)))


def _example(shape: Shape, dtype: torch.dtype, target: str, *, plan: Plan) -> Launch:
    x = torch.empty((shape.m, shape.k), dtype=dtype, device="meta")
    return plan(x, example_weight(shape, dtype), x.new_empty((shape.m, shape.n)), None, target)


def _sample(shape: Shape, dtype: torch.dtype, target: str, *, plan: Plan) -> Launch:
    x = torch.randn((shape.m, shape.k), generator=torch.Generator().manual_seed(1)).to(dtype)
    return plan(x, sample_weight(shape, dtype), x.new_empty((shape.m, shape.n)), None, target)


def _stored_bytes(shape: Shape) -> int:
    sizes = prepared_shapes(shape.n, shape.k)
    return sum(4 * torch.Size(size).numel() for size in sizes.values())


def _activation_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.m * (shape.k + shape.n) * dtype.itemsize


def _kernel(name: str, plan: Plan, budget: Mapping[torch.dtype, float] | None, m_range: tuple[int, int], **more: object) -> Kernel:
    return Kernel(
        name=f"two_four.{name}",
        op="two_four",
        function=f"two_four.kernel:{name}",
        example=partial(_example, plan=plan),
        bytes=lambda shape, dtype: _stored_bytes(shape) + _activation_bytes(shape, dtype),
        minimum_bytes=lambda shape, dtype: packed_bytes(shape.n, shape.k) + _activation_bytes(shape, dtype),
        weights=lambda shape: shape.n * shape.k // 2,
        weight_bytes=lambda shape, dtype: _stored_bytes(shape) if name == "mma_sp" else shape.n * shape.k,
        budget=budget,
        m_range=m_range,
        sample=partial(_sample, plan=plan),
        **more,
    )


KERNELS = (
    _kernel("select", plan_select, {torch.float16: 8.8, torch.bfloat16: 8.4}, (1, GEMV_TOKENS), loop_is_clean=True),
    _kernel(
        "mma_sp",
        plan_mma_sp,
        {torch.float16: 3.0, torch.bfloat16: 3.0},
        (1, MMA_TOKENS - 1),
        targets=NVIDIA,
        inline_asm=True,
        loop_is_clean=True,
    ),
)
PLANS: Mapping[str, Plan] = {"select": plan_select, "mma_sp": plan_mma_sp}
