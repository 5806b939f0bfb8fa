"""CPU kernels on random weights, each beside its fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from halfweight.triton_kernels.cpu import (
    group_int4,
    input_select,
    input_select_int4,
    int4,
    two_four,
    two_four_int4,
)
from halfweight.triton_kernels.formats import groups, groups_layer, integers
from halfweight.triton_kernels.formats import two_four as two_four_format
from halfweight.triton_kernels.formats import two_four_int4 as two_four_int4_format
from halfweight.triton_kernels.formats.bits import from_bits, to_bits
from halfweight.triton_kernels.formats.groups import KeptGroups
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.formats.integers import Quantized

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)
FEW = (1, 3, 9)
TOLERANCE = 1e-6
# what each dtype's rounding of y costs
ROUNDING = {torch.float32: TOLERANCE, torch.bfloat16: 3e-3, torch.float16: 4e-4}


class Case(NamedTuple):
    """`run(x, bias)` and what it should be, in fp64."""

    run: Callable[[Tensor, Tensor | None], Tensor]
    expected: Callable[[Tensor], Tensor]
    k: int
    n: int
    prepared: Any = None
    dense: Tensor | None = None
    rows: Any = None


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN when anything is."""
    return float(((actual.double() - expected).square().mean() / expected.square().mean()).sqrt())


def quantized(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> Quantized:
    generator, per_group = seeded(1), (shape[0], -(-shape[1] // group_size))
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 2**bits, per_group, generator=generator, dtype=torch.uint8)
    return Quantized(codes, torch.rand(per_group, generator=generator).half(), zeros)


def two_four_mask(n: int, k: int) -> Tensor:
    """Two of every four, and sometimes fewer."""
    order = torch.rand(n, k // 4, 4, generator=seeded(2)).argsort(-1).argsort(-1).flatten(1)
    return (order < 2) & (torch.rand(n, k, generator=seeded(3)) < 0.9)


def kept_groups(n: int, k: int, group_size: int, kept: int, symmetric: bool, segments: int = 1) -> KeptGroups:
    generator = seeded(4)
    per_segment = -(-k // group_size) // segments
    picks = torch.rand(n, segments, per_segment, generator=generator).argsort(-1)[..., : kept // segments]
    numbers = (picks.sort(-1).values + torch.arange(segments)[:, None] * per_segment).flatten(1)
    codes = torch.randint(0, 16, (n, kept, group_size), generator=generator, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 16, (n, kept), generator=generator, dtype=torch.uint8)
    return KeptGroups(codes, torch.rand(n, kept, generator=generator).half(), zeros, numbers)


def rows_case(module: Any, prepared: Any, dense: Tensor) -> Case:
    wide = dense.double()
    n, k = dense.shape
    run = lambda x, bias: module.linear(x, prepared, bias)  # noqa: E731
    return Case(run, lambda x: x.double() @ wide.T, k, n, prepared, dense, module.rows(prepared))


def two_four_case(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    weight = torch.randn(n, k, generator=seeded()).where(two_four_mask(n, k), torch.tensor(0.0)).to(dtype)
    return rows_case(two_four, two_four.prepare(*two_four_format.pack(weight)), weight)


def two_four_int4_case(n: int, k: int, group_size: int = 32, symmetric: bool = False) -> Case:
    packed = two_four_int4_format.pack(
        quantized((n, k), 4, group_size, symmetric), two_four_mask(n, k), group_size=group_size
    )
    dense = two_four_int4_format.dequantize(packed, group_size=group_size, columns=k)
    return rows_case(two_four_int4, two_four_int4.prepare(packed, group_size=group_size, columns=k), dense)


def integers_case(n: int, k: int, bits: int = 4, group_size: int = 32, symmetric: bool = False) -> Case:
    packed = integers.pack(quantized((n, k), bits, group_size, symmetric), bits=bits, group_size=group_size)
    options: dict[str, int] = {"bits": bits, "group_size": group_size, "columns": k}
    return rows_case(int4, int4.prepare(packed, **options), integers.dequantize(packed, **options))


def groups_case(
    n: int, k: int, group_size: int = 16, kept: int = 3, symmetric: bool = False, segments: int = 1
) -> Case:
    packed = groups.pack(kept_groups(n, k, group_size, kept, symmetric, segments), k, segments=segments)
    prepared = group_int4.prepare(packed, k, segments=segments)
    return rows_case(group_int4, prepared, groups.dequantize(packed, k, segments=segments))


def layer_entries(n: int, k: int, group_size: int) -> groups_layer.LayerGroups:
    """Rows with different counts, some of them empty."""
    kept = torch.rand(n, -(-k // group_size), generator=seeded(5)) < torch.rand(n, 1, generator=seeded(6))
    kept[[0, n - 1]] = False
    start = torch.cat((torch.zeros(1), kept.sum(1).cumsum(0))).int()
    every = kept_groups(1, int(kept.sum()) * group_size, group_size, int(kept.sum()), False)
    assert every.zeros is not None
    entries = KeptGroups(every.codes[0], every.scales[0], every.zeros[0], kept.nonzero()[:, 1])
    return groups_layer.pack(entries, start, k)


def layer_case(n: int, k: int, group_size: int = 16) -> Case:
    packed = layer_entries(n, k, group_size)
    return rows_case(group_int4, group_int4.prepare_layer(packed, k), groups_layer.dequantize(packed, k))


def input_selection(
    parts: int, k: int, n: int, norms: bool, rank: int, dtype: torch.dtype, topk: bool = False
) -> InputSelection:
    generator = seeded(7)
    thresholds = to_bits(torch.rand(parts, generator=generator) + 0.2)
    return InputSelection(
        None if topk else thresholds,
        to_bits(torch.rand(parts, k, generator=generator) + 0.5) if norms else None,
        torch.randn(parts, k, rank, generator=generator).to(dtype) if rank else None,
        torch.randn(n, rank, generator=generator).to(dtype) if rank else None,
        torch.linspace(1, k, parts + 2)[1:-1].int() if topk else None,
    )


def select_case(
    k: int,
    widths: list[int],
    kind: str = "plain",
    norms: bool = False,
    rank: int = 0,
    symmetric: bool = False,
    bits: int = 4,
    group_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    topk: bool = False,
) -> Case:
    n = sum(widths)
    selection = input_selection(len(widths), k, n, norms, rank, dtype, topk)
    if kind == "plain":
        dense = torch.randn(k, n, generator=seeded()).to(dtype)
        module, prepared = input_select, input_select.prepare(dense, selection, widths)
    elif kind == "integers":
        options = {"bits": bits, "group_size": group_size}
        packed = [integers.pack(quantized((k, width), bits, group_size, symmetric), **options) for width in widths]
        pairs = zip(packed, widths, strict=True)
        dense = torch.cat([integers.dequantize(part, columns=width, **options) for part, width in pairs], 1)
        module, prepared = input_select_int4, input_select_int4.prepare(packed, selection, widths, **options)
    else:
        parts = []
        for width in widths:
            total = -(-width // group_size)
            parts.append(groups.pack(kept_groups(k, width, group_size, (total + 1) // 2, symmetric), width))
        dense = torch.cat([groups.dequantize(part, width) for part, width in zip(parts, widths, strict=True)], 1)
        module, prepared = input_select_int4, input_select_int4.prepare_groups(parts, selection, widths)

    def expected(x: Tensor) -> Tensor:
        outputs, start = [], 0
        for p, width in enumerate(widths):
            columns = slice(start, start + width)
            size = x.float().abs() * (1.0 if selection.norms is None else from_bits(selection.norms)[p])
            if selection.counts is not None:  # at least so many, as some may tie
                last = size.sort(dim=1, descending=True).values[:, [int(selection.counts[p]) - 1]]
                kept = (size >= last) & (size > 0)
            else:
                assert selection.thresholds is not None
                kept = size > from_bits(selection.thresholds)[p]
            y = x.double().where(kept, torch.tensor(0.0).double()) @ dense[:, columns].double()
            if selection.V is not None and selection.U is not None:
                rest = x.double().masked_fill(kept, 0.0)
                y = y + rest @ selection.V[p].double() @ selection.U[columns].double().T
            outputs.append(y)
            start += width
        return torch.cat(outputs, 1)

    return Case(lambda x, bias: module.linear(x, prepared, bias), expected, k, n, prepared, dense)


def check(case: Case, tokens: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    for m in tokens:
        x = (torch.randn(m, case.k, generator=seeded(m)) * scale).to(dtype)
        bias = torch.randn(case.n, generator=seeded(9)).to(dtype)
        with poisoned():
            y, plain = case.run(x, bias), case.run(x, None)
        assert y.dtype == dtype and y.shape == (m, case.n)
        assert relative_error(y, case.expected(x) + bias.double()) < ROUNDING[dtype], m
        assert relative_error(plain, case.expected(x)) < ROUNDING[dtype], m


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# One of everything, at odd sizes.
CASES: dict[str, Callable[[], Case]] = {
    "two_four": lambda: two_four_case(37, 100),
    "two_four_int4": lambda: two_four_int4_case(37, 100),
    "int4": lambda: integers_case(37, 101),
    "int8": lambda: integers_case(37, 101, bits=8),
    "groups": lambda: groups_case(37, 101),
    "layer": lambda: layer_case(37, 101),
    "select": lambda: select_case(53, [33, 20, 17], norms=True, rank=5),
    "select_topk": lambda: select_case(53, [33, 20, 17], norms=True, rank=5, topk=True),
    "select_int4": lambda: select_case(53, [33, 20, 17], "integers", rank=5),
    "select_groups": lambda: select_case(53, [33, 20, 17], "groups", rank=5),
}
