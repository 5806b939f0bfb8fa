"""`halfweight::tied_lookup_gpu`: embedding rows from the tensors of a tied head, and the facts about its kernel.

The head itself is `int4`'s linear on the same prepared weight, N = vocabulary and K = hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..int4 import op as int4
from ..int4.layout import Prepared, prepare, restore
from ..int4.op import Numbers, example_weight, sample_weight
from ..launch import Kernel, Launch, Shape, device_target
from ..library import register as register_operator

__all__ = ["KERNELS", "Prepared", "logits", "lookup", "plan_lookup", "prepare", "register", "restore"]

NUMBERS = Numbers(bits=8, group_size=128)  # of the examples


def logits(x: Tensor, prepared: Prepared) -> Tensor:
    """`x[..., hidden]` -> `[..., vocabulary]` on a GPU."""
    return int4.linear(x, prepared)


def lookup(ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Rows `[..., hidden]` of int32 or int64 `ids` `[...]` on a GPU.

    An id outside the vocabulary reads nothing and gives NaN: raising would have to wait for the device.
    """
    out = torch.empty((*ids.shape, prepared.columns), dtype=dtype, device=ids.device)
    if ids.numel():
        KERNELS[0].run(plan_lookup(ids.reshape(-1).contiguous(), prepared, out, device_target(ids.device)))
    return out


def plan_lookup(ids: Tensor, prepared: Prepared, out: Tensor, target: str) -> Launch:
    """`ids` `[T]`; `out` `[T, hidden]` of any float type."""
    block = 256 if prepared.columns <= 1024 else 1024
    arguments: dict[str, Any] = {
        "ids": ids,
        "codes": prepared.codes,
        "scales": prepared.scales,
        "out": out,
        "V": prepared.rows,
        "H": prepared.columns,
        "blocks": prepared.codes.shape[1],
        "quads": prepared.scales.shape[1],
    }
    constants: dict[str, Any] = {"BITS": prepared.bits, "GROUP": prepared.group, "BLOCK": block}
    (constants if prepared.zeros is None else arguments)["zeros"] = prepared.zeros
    return Launch((ids.numel(), -(-prepared.columns // block)), arguments, constants, num_warps=block // 256)


def register() -> None:
    """Define `halfweight::tied_lookup_gpu`, idempotently."""
    register_operator(
        "tied_lookup_gpu(Tensor ids, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int rows,"
        " int columns, ScalarType dtype) -> Tensor",
        {"CUDA": lambda ids, *fields: lookup(ids, Prepared(*fields[:-1]), fields[-1])},
        lambda ids, *fields: ids.new_empty((*ids.shape, fields[6]), dtype=fields[7]),
    )


# --- facts ---


def _example(shape: Shape, dtype: torch.dtype, target: str, *, real: bool) -> Launch:
    weight = sample_weight(shape, NUMBERS) if real else example_weight(shape, NUMBERS)
    device = "cpu" if real else "meta"
    ids = torch.arange(shape.m, device=device) * 16 % shape.n
    return plan_lookup(ids, weight, torch.empty((shape.m, shape.k), dtype=dtype, device=device), target)


def _bytes(shape: Shape, dtype: torch.dtype, rows: int) -> int:
    """`rows` times the codes of each distinct id, a sector of its scales for every quad of groups; ids and outputs."""
    distinct = min(shape.m, -(-shape.n // 16))  # of the examples' ids
    read = distinct * (rows * -(-shape.k // 64) * 64 + -(-shape.k // 512) * 32)
    return read + shape.m * (8 + shape.k * dtype.itemsize)


def steps(shape: Shape, dtype: torch.dtype, target: str) -> list[tuple[str, Launch]]:
    """One token's way through an int8 module: its row, and the logits of `[n, k]`; for each of `m` tokens.

    Raises LookupError where the head has no kernel of known cost.
    """
    if int4.choose(*shape, dtype, target) != "fragment":
        raise LookupError(f"no head of known cost for {shape.m} tokens on {target}")
    head = next(kernel for kernel in int4.KERNELS if kernel.name == "int4.fragment_int8")
    return [(kernel.name, kernel.example(shape, dtype, target)) for kernel in (KERNELS[0], head)]


KERNELS = (
    Kernel(
        name="tied.lookup",
        op="tied",
        function="tied.kernel:lookup",
        example=partial(_example, real=False),
        bytes=partial(_bytes, rows=2),
        minimum_bytes=partial(_bytes, rows=1),
        weights=lambda shape: shape.m * shape.k,
        weight_bytes=lambda shape, dtype: 0,
        budget=None,
        m_range=(1, 2**16),
        sample=partial(_example, real=True),
    ),
)
