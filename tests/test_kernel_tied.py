"""A tied embedding and head on GPUs: rows and logits from one set of tensors, interpreted against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfweight.triton_kernels.formats import integers
from halfweight.triton_kernels.formats.integers import Quantized
from halfweight.triton_kernels.int4 import op as int4
from halfweight.triton_kernels.launch import Shape
from halfweight.triton_kernels.tied import op, reference

pytest.importorskip("triton")

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.simulate.interpreter import interpret
from halfweight.triton_kernels.simulate.meter import guarded, meter

TARGET = "sm_90"
LOOKUP = op.KERNELS[0]
CASES = [
    (bits, group, symmetric, hidden)
    for bits in (4, 8)
    for group, hidden in ((32, 104), (64, 576), (1024, 640))
    for symmetric in (True, False)
]


def table(vocabulary: int, hidden: int, bits: int, group_size: int, symmetric: bool) -> integers.Integers:
    generator = torch.Generator().manual_seed(hidden)
    groups = (vocabulary, -(-hidden // group_size))
    quantized = Quantized(
        torch.randint(2**bits, (vocabulary, hidden), generator=generator, dtype=torch.uint8),
        (torch.rand(groups, generator=generator) + 0.1).half(),
        None if symmetric else torch.randint(2**bits, groups, generator=generator, dtype=torch.uint8),
    )
    return integers.pack(quantized, bits=bits, group_size=group_size)


def look_up(ids: Tensor, prepared: op.Prepared) -> Tensor:
    """fp32 rows (poisoned beforehand) of one interpreted launch, every tensor between red zones."""
    out = guarded(torch.full((len(ids), prepared.columns), -1.0))
    tensors = {key: guarded(value) for key, value in prepared._asdict().items() if isinstance(value, Tensor)}
    meter(LOOKUP.jit(), op.plan_lookup(guarded(ids), prepared._replace(**tensors), out, TARGET))
    return out


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "hidden"), CASES)
def test_rows_are_exact(bits: int, group_size: int, symmetric: bool, hidden: int) -> None:
    numbers = {"bits": bits, "group_size": group_size}
    packed = table(50, hidden, **numbers, symmetric=symmetric)
    prepared = op.prepare(packed, columns=hidden, **numbers)
    ids = torch.tensor([0, 49, 7, 8, 15, 16, 33, 7])
    expected = reference.lookup(ids, packed, **numbers, hidden=hidden, dtype=torch.float32)
    assert torch.equal(look_up(ids, prepared), expected)
    assert torch.equal(look_up(ids.int(), prepared), expected)


def test_ids_outside_the_vocabulary_read_nothing_and_give_nan() -> None:
    prepared = op.prepare(table(20, 64, 4, 64, False), bits=4, group_size=64, columns=64)
    rows = look_up(torch.tensor([-1, 19, 20, 2**40, -(2**40)]), prepared)
    assert rows.isnan().all(1).tolist() == [True, False, True, True, True]
    assert not rows[1].isnan().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_logits_come_from_the_same_tensors(bits: int) -> None:
    packed = table(40, 64, bits, 64, True)
    prepared = op.prepare(packed, bits=bits, group_size=64, columns=64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    y = torch.full((2, 40), float("nan"))
    interpret(int4.KERNELS[0].jit(), int4.PLANS["fragment"](x, prepared, y, None, TARGET))
    expected = reference.logits(x.double(), packed, bits=bits, group_size=64)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5


def test_bytes() -> None:
    """A row of a pair of rows that share their words: the codes count twice."""
    shape = Shape(4, 64, 640)
    metering = meter(LOOKUP.jit(), LOOKUP.sample(shape, torch.float16, TARGET))
    assert metering.dram_bytes == LOOKUP.bytes(shape, torch.float16)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_it_compiles_for_large_vocabularies(target: str) -> None:
    launch = LOOKUP.example(Shape(8, 262144, 640), torch.bfloat16, target)
    assert aot.compile_launch(LOOKUP.jit(), launch, target).spills == 0
