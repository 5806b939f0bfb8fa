"""`halfweight::two_four_gpu`: 2:4 linears with 16-bit values on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import trust
from ..formats import two_four
from ..launch import NVIDIA, Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from .layout import Prepared, packed_bytes, prepare, prepared_shapes
from .plan import EXPAND_FROM, GEMV_TOKENS, can_run, choose, plan_dot, plan_expand, plan_mma_sp, plan_select

__all__ = ["KERNELS", "PLANS", "can_run", "choose", "expand", "linear", "register"]

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None, *, scratch: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` -> `[..., N]` on a GPU, x in the values' dtype (ValueError otherwise).

    `scratch`: at least N * K elements of that dtype, where many tokens' dense weight goes; allocated when missing.
    """
    if x.dtype != prepared.dtype:
        raise ValueError(f"the weight is {prepared.dtype}, x is {x.dtype}")
    tokens = x.reshape(-1, prepared.k).contiguous()
    m, target = len(tokens), device_target(x.device)
    asm, _ = trust.may_run("two_four.mma_sp", x.device, inline_asm=True, tokens=m)
    name = choose(m, prepared.n, prepared.k, x.dtype, target, asm)
    if name == "expand":
        y = F.linear(tokens, expand(prepared, scratch), bias)
    else:
        if tokens.data_ptr() % 16:
            tokens = tokens.clone()
        y = tokens.new_empty((m, prepared.n))
        if m:
            _KERNEL_OF[name].run(PLANS[name](tokens, prepared, y, bias, target))
    return y.reshape(*x.shape[:-1], prepared.n)


def expand(prepared: Prepared, scratch: Tensor | None = None) -> Tensor:
    """The dense weight `[N, K]` on its GPU; see `linear` for `scratch`."""
    size = scratch_numbers(prepared)
    if scratch is None:
        scratch = torch.empty(size, dtype=prepared.dtype, device=prepared.fragments.device)
    dense = scratch[:size].view(prepared.n, prepared.k)
    _KERNEL_OF["expand"].run(plan_expand(prepared, dense, device_target(dense.device)))
    return dense


def scratch_numbers(prepared: Prepared) -> int:
    """Elements of `scratch` that `linear` has a use for."""
    return prepared.n * prepared.k


def register() -> None:
    """Define `halfweight::two_four_gpu`, idempotently."""

    def operator(
        x: Tensor, fragments: Tensor, metadata: Tensor, n: int, k: int, bf16: int, bias: Tensor | None
    ) -> Tensor:
        return linear(x, Prepared(fragments, metadata, n, k, bf16), bias)

    register_operator(
        "two_four_gpu(Tensor x, Tensor fragments, Tensor metadata, int n, int k, int bf16, Tensor? bias) -> Tensor",
        {"CUDA": operator},
        lambda x, fragments, metadata, n, k, bf16, bias: x.new_empty((*x.shape[:-1], n)),
    )


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


def _plan_expand(x: Tensor, prepared: Prepared, y: Tensor, bias: Tensor | None, target: str) -> Launch:
    return plan_expand(prepared, torch.empty((prepared.n, prepared.k), dtype=x.dtype, device=x.device), target)


def _stored_bytes(shape: Shape) -> int:
    sizes = prepared_shapes(shape.n, shape.k)
    return sum(4 * torch.Size(size).numel() for size in sizes.values())


def _activation_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.m * (shape.k + shape.n) * dtype.itemsize


def _kernel(
    name: str,
    module: str,
    plan: Plan,
    budget: Mapping[torch.dtype, float] | None,
    m_range: tuple[int, int],
    **more: Any,
) -> Kernel:
    def other_bytes(shape: Shape, dtype: torch.dtype) -> int:
        if name == "expand":
            return shape.n * shape.k * dtype.itemsize
        return _activation_bytes(shape, dtype)

    return Kernel(
        name=f"two_four.{name}",
        op="two_four",
        function=f"two_four.{module}:{name}",
        example=partial(_example, plan=plan),
        bytes=lambda shape, dtype: _stored_bytes(shape) + other_bytes(shape, dtype),
        minimum_bytes=lambda shape, dtype: packed_bytes(shape.n, shape.k) + other_bytes(shape, dtype),
        weights=lambda shape: shape.n * shape.k // 2,
        weight_bytes=lambda shape, dtype: _stored_bytes(shape) if name == "mma_sp" else shape.n * shape.k,
        budget=budget,
        m_range=m_range,
        sample=partial(_sample, plan=plan),
        **more,
    )


_MANY = EXPAND_FROM - 1
KERNELS = (
    _kernel(
        "select",
        "kernel",
        plan_select,
        {torch.float16: 8.8, torch.bfloat16: 8.4},
        (1, GEMV_TOKENS),
        loop_is_clean=True,
    ),
    _kernel(
        "mma_sp",
        "kernel",
        plan_mma_sp,
        {torch.float16: 3.0, torch.bfloat16: 3.0},
        (1, _MANY),
        targets=NVIDIA,
        inline_asm=True,
        loop_is_clean=True,
    ),
    _kernel("dot", "dense", plan_dot, None, (GEMV_TOKENS + 1, _MANY)),
    _kernel("expand", "dense", _plan_expand, None, (EXPAND_FROM, EXPAND_FROM)),
)
PLANS: Mapping[str, Plan] = {"select": plan_select, "mma_sp": plan_mma_sp, "dot": plan_dot}
_KERNEL_OF = {kernel.name.partition(".")[2]: kernel for kernel in KERNELS}
