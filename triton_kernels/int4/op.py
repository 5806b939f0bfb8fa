"""`halfweight::int4_gpu`: dense int4 and int8 linears on GPUs, and the facts about their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import trust
from ..formats import integers
from ..formats.integers import Quantized
from ..launch import EVERY_GPU, NVIDIA, Kernel, Launch, Shape, device_target
from ..library import register as register_operator
from .layout import Prepared, kernel_group, prepare, prepared_shapes
from .plan import (
    EXPAND_FROM,
    FRAGMENT_TOKENS,
    GEMV_TOKENS,
    can_run,
    choose,
    plan_dot,
    plan_expand,
    plan_fragment,
    plan_simt,
)

__all__ = ["KERNELS", "PLANS", "can_run", "choose", "expand", "linear", "register"]

Plan = Callable[[Tensor, Prepared, Tensor, Tensor | None, str], Launch]
PLANS: Mapping[str, Plan] = {"fragment": plan_fragment, "simt": plan_simt, "dot": plan_dot}
SCRATCH_NUMBERS = 2**25  # of an expanded weight at a time: 64 MiB in 16 bits
ALIGNED_COLUMNS = 16


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
    after it was checked there. `scratch`: room for `expand`, at least a tile of 16 rows, in x's dtype; allocated when
    None.
    """
    tokens = pad_columns(x.reshape(-1, prepared.columns))
    m, target = tokens.shape[0], device_target(x.device)
    asm, _ = trust.may_run("int4.fragment", x.device, inline_asm=True, tokens=m)
    kernel = kernel or choose(m, prepared.rows, prepared.columns, x.dtype, target, asm)
    y = tokens.new_empty((m, prepared.rows))
    if kernel == "expand":
        expand_and_multiply(tokens[:, : prepared.columns], prepared, bias, y, target, scratch)
    elif m:
        _BY_FUNCTION[kernel].run(PLANS[kernel](tokens, prepared, y, bias, target))
    return y.reshape(*x.shape[:-1], prepared.rows)


def pad_columns(x: Tensor) -> Tensor:
    """Contiguous `x[M, K]` with zeros up to 32 bytes, so that rows can be loaded 16 bytes at a time."""
    return F.pad(x, (0, -x.shape[1] % ALIGNED_COLUMNS)).contiguous()


def expand_and_multiply(
    x: Tensor, prepared: Prepared, bias: Tensor | None, y: Tensor, target: str, scratch: Tensor | None = None
) -> None:
    """`y[M, N] = x[M, K] W^T + bias`, expanding as many rows of W at a time as `scratch` holds."""
    scratch = x.new_empty(scratch_numbers(prepared)) if scratch is None else scratch.flatten()
    step = scratch.numel() // (16 * prepared.columns)  # tiles
    for first in range(0, prepared.codes.shape[0], step):
        part = rows_of(prepared, first, first + step)
        weight = scratch[: part.rows * part.columns].view(part.rows, part.columns)
        expand(part, weight, target)
        columns = slice(16 * first, 16 * first + part.rows)
        y[:, columns] = F.linear(x, weight, None if bias is None else bias[columns])


def scratch_numbers(prepared: Prepared) -> int:
    """Elements of `scratch` that `linear` has a use for."""
    tiles, tile = prepared.codes.shape[0], 16 * prepared.columns
    return tile * min(tiles, max(1, SCRATCH_NUMBERS // tile))


def expand(prepared: Prepared, weight: Tensor, target: str) -> None:
    """Write the dense weight to `weight` `[N, K]`."""
    _BY_FUNCTION["expand"].run(plan_expand(prepared, weight, target))


def rows_of(prepared: Prepared, first: int, stop: int) -> Prepared:
    """Tiles `first` to `stop` (exclusive) of a weight without an expert axis, sharing memory."""
    return prepared._replace(
        codes=prepared.codes[first:stop],
        scales=prepared.scales[first:stop],
        zeros=None if prepared.zeros is None else prepared.zeros[first:stop],
        rows=min(prepared.rows, 16 * stop) - 16 * first,
    )


def register() -> None:
    """Define `halfweight::int4_gpu`, idempotently."""
    register_operator(
        "int4_gpu(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int rows, int columns,"
        " Tensor? bias) -> Tensor",
        {"CUDA": lambda x, *fields: linear(x, Prepared(*fields[:-1]), fields[-1])},
        lambda x, codes, scales, zeros, bits, group, rows, columns, bias: x.new_empty((*x.shape[:-1], rows)),
    )


# --- facts ---


@dataclass(frozen=True)
class Numbers:
    """How the weights of an example are quantized."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True


def example_weight(shape: Shape, numbers: Numbers) -> Prepared:
    """A weight of `shape` on the meta device."""
    tensors = {
        name: torch.empty(size, dtype=torch.int32, device="meta") for name, size in _shapes(shape, numbers).items()
    }
    group = kernel_group(numbers.group_size, shape.k)
    return Prepared(tensors["codes"], tensors["scales"], tensors.get("zeros"), numbers.bits, group, shape.n, shape.k)


def sample_weight(shape: Shape, numbers: Numbers, seed: int = 0) -> Prepared:
    """A random weight of `shape` on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape.n, -(-shape.k // numbers.group_size))
    levels = 2**numbers.bits
    quantized = Quantized(
        torch.randint(levels, (shape.n, shape.k), generator=generator, dtype=torch.uint8),
        (torch.rand(groups, generator=generator) + 0.5).half(),
        None if numbers.symmetric else torch.randint(levels, groups, generator=generator, dtype=torch.uint8),
    )
    packed = integers.pack(quantized, bits=numbers.bits, group_size=numbers.group_size)
    return prepare(packed, bits=numbers.bits, group_size=numbers.group_size, columns=shape.k)


def _shapes(shape: Shape, numbers: Numbers) -> dict[str, tuple[int, ...]]:
    group = kernel_group(numbers.group_size, shape.k)
    return prepared_shapes((shape.n, shape.k), bits=numbers.bits, group=group, symmetric=numbers.symmetric)


def _example(shape: Shape, dtype: torch.dtype, target: str, *, name: str, numbers: Numbers, real: bool) -> Launch:
    weight = sample_weight(shape, numbers) if real else example_weight(shape, numbers)
    device = "cpu" if real else "meta"
    if name == "expand":
        return plan_expand(weight, torch.empty((shape.n, shape.k), dtype=dtype, device=device), target)
    x = torch.empty((shape.m, shape.k), dtype=dtype, device=device)
    if real:
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    return PLANS[name](pad_columns(x), weight, x.new_empty((shape.m, shape.n)), None, target)


def _kernel(name: str, variant: str, numbers: Numbers, m_range: tuple[int, int], **more: Any) -> Kernel:
    def stored(shape: Shape, names: tuple[str, ...] = ("codes", "scales", "zeros")) -> int:
        return sum(4 * torch.Size(size).numel() for key, size in _shapes(shape, numbers).items() if key in names)

    def activations(shape: Shape, dtype: torch.dtype) -> int:
        if name == "expand":
            return shape.n * shape.k * dtype.itemsize
        return shape.m * (shape.k + shape.n) * dtype.itemsize

    def file_bytes(shape: Shape) -> int:
        shapes = integers.packed_shapes(
            (shape.n, shape.k), bits=numbers.bits, group_size=numbers.group_size, symmetric=numbers.symmetric
        )
        return sum(torch.Size(size).numel() * (2 if key == "scales" else 1) for key, size in shapes.items())

    marked = ("codes", "scales") if name == "fragment" else ("codes",)
    return Kernel(
        name=f"int4.{variant}",
        op="int4",
        function=f"int4.kernel:{name}",
        example=partial(_example, name=name, numbers=numbers, real=False),
        bytes=lambda shape, dtype: stored(shape) + activations(shape, dtype),
        minimum_bytes=lambda shape, dtype: file_bytes(shape) + activations(shape, dtype),
        weights=lambda shape: shape.n * shape.k,
        weight_bytes=lambda shape, dtype: stored(shape, marked),
        m_range=m_range,
        sample=partial(_example, name=name, numbers=numbers, real=True),
        **more,
    )


def _budget(fp16: float, bf16: float) -> dict[torch.dtype, float]:
    return {torch.float16: fp16, torch.bfloat16: bf16}


_TENSOR_CORES: dict[str, Any] = {"targets": NVIDIA, "inline_asm": True, "loop_is_clean": True}
KERNELS = (
    _kernel("fragment", "fragment", Numbers(), (1, FRAGMENT_TOKENS), budget=_budget(2.2, 2.45), **_TENSOR_CORES),
    _kernel(
        "fragment",
        "fragment_zeros",
        Numbers(group_size=64, symmetric=False),
        (1, FRAGMENT_TOKENS),
        budget=_budget(2.4, 2.7),
        **_TENSOR_CORES,
    ),
    _kernel(
        "fragment", "fragment_int8", Numbers(bits=8), (1, FRAGMENT_TOKENS), budget=_budget(2.2, 3.7), **_TENSOR_CORES
    ),
    _kernel("simt", "simt", Numbers(), (1, GEMV_TOKENS), budget=_budget(4.6, 4.6), loop_is_clean=True),
    _kernel("dot", "dot", Numbers(), (GEMV_TOKENS + 1, EXPAND_FROM - 1), budget=None),
    _kernel("expand", "expand", Numbers(), (EXPAND_FROM, 2**20), budget=None, targets=EVERY_GPU),
)
_BY_FUNCTION: Mapping[str, Kernel] = {kernel.function.partition(":")[2]: kernel for kernel in reversed(KERNELS)}
