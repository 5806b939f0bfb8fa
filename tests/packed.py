"""Random packed weights, and damage to them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats.groups import KeptGroups
from halfweight.triton_kernels.formats.integers import Quantized

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LEADS = st.sampled_from([(), (2,), (2, 3)])
SCALES = torch.tensor([0.0, 2.0**-24, 0.01, 1.0, 65504.0], dtype=torch.float16)


def random_scales(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp16 magnitudes from zero and the smallest subnormal to the largest number."""
    return SCALES[torch.randint(len(SCALES), shape, generator=generator)]


def random_bytes(shape: tuple[int, ...], top: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)


def random_quantized(
    shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, generator: torch.Generator
) -> Quantized:
    per_group = (*shape[:-1], -(-shape[-1] // group_size))
    zeros = None if symmetric else random_bytes(per_group, 2**bits, generator)
    return Quantized(random_bytes(shape, 2**bits, generator), random_scales(per_group, generator), zeros)


def random_groups(
    rows: tuple[int, ...], columns: int, group_size: int, kept: int, segments: int, generator: torch.Generator
) -> KeptGroups:
    """Row-balanced groups whose kept numbers are random inside each segment."""
    per_segment = -(-columns // group_size) // segments
    picks = torch.rand(*rows, segments, per_segment, generator=generator).argsort(-1)[..., : kept // segments]
    numbers = picks.sort(-1).values + torch.arange(segments)[:, None] * per_segment
    codes = random_bytes((*rows, kept, group_size), 16, generator)
    zeros = random_bytes((*rows, kept), 16, generator)
    return KeptGroups(codes, random_scales((*rows, kept), generator), zeros, numbers.flatten(-2))


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Equal tensors (or None) with equal dtypes, field by field."""
    return all(
        x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def poke(packed: Any, name: str, index: Any, value: int) -> Any:
    """`packed` with one entry of the tensor `name` overwritten."""
    tensor = getattr(packed, name).clone()
    tensor[index] = value
    return packed._replace(**{name: tensor})
