"""The quantized formats: exact round trips, documented bytes, exact zeros, and a guard against hostile files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import (
    FormatError,
    integers,
    two_four_int4,
)
from halfweight.triton_kernels.formats.bits import from_bits, pack_nibbles, to_bits, unpack_nibbles
from halfweight.triton_kernels.formats.integers import Quantized
from packed import LEADS, examples, poke, random_quantized, same

# ---- bits


def test_bit_patterns_survive_and_share_memory() -> None:
    for dtype in (torch.float16, torch.float32):
        values = torch.tensor([0.0, -0.0, 1.5, float("inf"), float("nan")], dtype=dtype)
        assert torch.equal(to_bits(from_bits(to_bits(values))), to_bits(values))
        assert to_bits(values).data_ptr() == values.data_ptr()
    with pytest.raises(FormatError, match="bfloat16"):
        to_bits(torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(FormatError, match="int64"):
        from_bits(torch.zeros(1, dtype=torch.int64))


@given(st.lists(st.integers(0, 15), max_size=9))
@examples
def test_nibbles(values: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(values, dtype=torch.uint8))
    assert packed.tolist() == [a | b << 4 for a, b in zip(values[::2], [*values[1::2], 0], strict=False)]
    assert unpack_nibbles(packed, len(values)).tolist() == values


# ---- integers


@st.composite
def quantized(draw: st.DrawFn) -> tuple[Quantized, dict[str, Any]]:
    bits, symmetric = draw(st.sampled_from([4, 8])), draw(st.booleans())
    columns = draw(st.integers(1, 21))
    group_size = draw(st.sampled_from([2, 4, 6, columns + columns % 2]))
    shape = (*draw(LEADS), draw(st.integers(1, 4)), columns)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return random_quantized(shape, bits, group_size, symmetric, generator), {"bits": bits, "group_size": group_size}


@given(quantized())
@examples
def test_integers_round_trip(case: tuple[Quantized, dict[str, Any]]) -> None:
    numbers, options = case
    shape, symmetric = tuple(numbers.codes.shape), numbers.zeros is None
    packed = integers.pack(numbers, **options)
    shapes = integers.packed_shapes(shape, symmetric=symmetric, **options)
    assert {k: tuple(v.shape) for k, v in packed._asdict().items() if v is not None} == shapes
    integers.validate(packed, shape, symmetric=symmetric, **options)
    assert same(integers.unpack(packed, columns=shape[-1], **options), numbers)
    # decoded one by one, in fp64
    dense = integers.dequantize(packed, columns=shape[-1], dtype=torch.float64, **options)
    for i, value in enumerate(dense.flatten().tolist()):
        row, column = divmod(i, shape[-1])
        group = column // options["group_size"]
        zero = 2 ** (options["bits"] - 1) if symmetric else int(numbers.zeros.flatten(0, -2)[row, group])
        code, scale = int(numbers.codes.flatten(0, -2)[row, column]), float(numbers.scales.flatten(0, -2)[row, group])
        assert value == scale * (code - zero)


def test_integers_have_the_documented_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5], [15, 14, 13, 12, 11]], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 2.0], [0.5, 0.0]], dtype=torch.float16)
    zeros = torch.tensor([[7, 9], [1, 2]], dtype=torch.uint8)
    packed = integers.pack(Quantized(codes, scales, zeros), bits=4, group_size=4)
    assert packed.codes.tolist() == [[0x21, 0x43, 0x95, 0x99], [0xEF, 0xCD, 0x2B, 0x22]]
    assert packed.scales.tolist() == [[0x3C00, 0x4000], [0x3800, 0]]
    assert packed.zeros is not None and packed.zeros.tolist() == [[0x97], [0x21]]
    packed = integers.pack(Quantized(codes, scales, None), bits=8, group_size=4)
    assert packed.codes.tolist() == [[1, 2, 3, 4, 5, 128, 128, 128], [15, 14, 13, 12, 11, 128, 128, 128]]


def test_padding_and_zero_points_decode_to_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 8):
        numbers = random_quantized((5, 9), bits, 4, False, generator)
        assert numbers.zeros is not None
        packed = integers.pack(numbers, bits=bits, group_size=4)
        assert not integers.dequantize(packed, bits=bits, group_size=4, columns=12)[:, 9:].any()
        zeroed = numbers._replace(codes=numbers.zeros.repeat_interleave(4, -1)[:, :9])
        assert not integers.dequantize(
            integers.pack(zeroed, bits=bits, group_size=4), bits=bits, group_size=4, columns=9
        ).any()


def integers_case(bits: int) -> integers.Integers:
    numbers = random_quantized((3, 10), bits, 4, False, torch.Generator().manual_seed(1))
    return integers.pack(numbers, bits=bits, group_size=4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p._replace(codes=p.codes[:, 1:]), "codes has shape"),
        (lambda p: p._replace(codes=p.codes.char()), "codes must be uint8"),
        (lambda p: p._replace(scales=p.scales[:, 1:]), "scales has shape"),
        (lambda p: p._replace(scales=p.scales.view(torch.float16)), "scales must be int16"),
        (lambda p: poke(p, "scales", (1, 2), 0x7C00), r"scales has an entry .* at \[1, 2\]"),
        (lambda p: poke(p, "scales", (0, 0), 0x7E00), "finite"),
        (lambda p: poke(p, "scales", (0, 0), -0x8000), "finite"),
        (lambda p: p._replace(zeros=None), "missing"),
        (lambda p: p._replace(zeros=p.zeros.short()), "zeros must be uint8"),
        (lambda p: p._replace(codes=p.codes ^ 0x88), "padding"),
    ],
)
def test_hostile_integers_are_refused(bits: int, damage: Any, message: str) -> None:
    packed = integers_case(bits)
    integers.validate(packed, (3, 10), bits=bits, group_size=4, symmetric=False)
    with pytest.raises(FormatError, match=message):
        integers.validate(damage(packed), (3, 10), bits=bits, group_size=4, symmetric=False)


def test_zero_point_padding_is_refused() -> None:
    packed = integers_case(4)
    with pytest.raises(FormatError, match="zeros has an entry"):
        integers.validate(poke(packed, "zeros", (2, 1), 0xF0), (3, 10), bits=4, group_size=4, symmetric=False)
    with pytest.raises(FormatError, match="are there"):
        integers.validate(packed, (3, 10), bits=4, group_size=4, symmetric=True)


def test_integers_that_cannot_be_stored_are_refused() -> None:
    good = random_quantized((2, 4), 4, 4, False, torch.Generator().manual_seed(0))
    for bad, message in (
        (good._replace(codes=good.codes + 16), "codes has an entry that is no 4-bit code"),
        (good._replace(zeros=torch.full((2, 1), 16, dtype=torch.uint8)), "zeros has an entry"),
        (good._replace(scales=-good.scales - 1), "scales has an entry"),
        (good._replace(scales=good.scales.float()), "scales must be float16"),
    ):
        with pytest.raises(FormatError, match=message):
            integers.pack(bad, bits=4, group_size=4)
    for bits, group_size, message in ((3, 4, "4 or 8 bits"), (4, 3, "even"), (4, 0, "even")):
        with pytest.raises(FormatError, match=message):
            integers.packed_shapes((2, 4), bits=bits, group_size=group_size, symmetric=True)


# ---- 2:4 int4


@st.composite
def two_four_quantized(draw: st.DrawFn) -> tuple[Quantized, Tensor, int]:
    columns, group_size = 4 * draw(st.integers(1, 7)), draw(st.sampled_from([4, 8, 12, 32]))
    shape = (*draw(LEADS), draw(st.integers(1, 4)), columns)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    numbers = random_quantized(shape, 4, group_size, draw(st.booleans()), generator)
    order = torch.rand(shape, generator=generator).unflatten(-1, (-1, 4)).argsort(-1).argsort(-1).flatten(-2)
    return numbers, (order < 2) & (torch.rand(shape, generator=generator) < 0.8), group_size


@given(two_four_quantized())
@examples
def test_two_four_int4_round_trip(case: tuple[Quantized, Tensor, int]) -> None:
    numbers, mask, group_size = case
    shape, symmetric = tuple(numbers.codes.shape), numbers.zeros is None
    packed = two_four_int4.pack(numbers, mask, group_size=group_size)
    shapes = two_four_int4.packed_shapes(shape, group_size=group_size, symmetric=symmetric)
    assert {k: tuple(v.shape) for k, v in packed._asdict().items() if v is not None} == shapes
    two_four_int4.validate(packed, shape, group_size=group_size, symmetric=symmetric)
    again, kept = two_four_int4.unpack(packed, group_size=group_size, columns=shape[-1])
    assert torch.equal(kept & mask, mask) and bool((kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    assert torch.equal(again.codes[mask], numbers.codes[mask])
    assert same(again[1:], numbers[1:])
    assert same(two_four_int4.pack(again, kept, group_size=group_size), packed)
    dense = integers.dequantize(
        integers.pack(numbers, bits=4, group_size=group_size), bits=4, group_size=group_size, columns=shape[-1]
    )
    sparse = two_four_int4.dequantize(packed, group_size=group_size, columns=shape[-1])
    assert torch.equal(sparse, torch.where(mask, dense, 0.0))


def test_two_four_int4_refuses_what_does_not_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers, mask = random_quantized((2, 8), 4, 4, True, generator), torch.tensor([True, True, False, False] * 2)
    packed = two_four_int4.pack(numbers, mask.expand(2, 8), group_size=4)
    with pytest.raises(FormatError, match="more than 2"):
        two_four_int4.pack(numbers, torch.ones(2, 8, dtype=torch.bool), group_size=4)
    with pytest.raises(FormatError, match="mask"):
        two_four_int4.pack(numbers, mask, group_size=4)
    with pytest.raises(FormatError, match="divisible by 4"):
        two_four_int4.packed_shapes((2, 8), group_size=6, symmetric=True)
    for bad, message in (
        (poke(packed, "meta", (1, 0), 0x44 ^ 0x40), "meta has kept positions"),
        (poke(packed, "scales", (1, 0), -1), "scales has an entry"),
        (packed._replace(codes=packed.codes[:, :1]), "codes has shape"),
    ):
        with pytest.raises(FormatError, match=message):
            two_four_int4.validate(bad, (2, 8), group_size=4, symmetric=True)
