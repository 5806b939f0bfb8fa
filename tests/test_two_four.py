"""The 2:4 format: exact round trips, one encoding per weight, and a guard against hostile metadata."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import FormatError, two_four

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {2: torch.int16, 4: torch.int32}
# Positions of a group's non-zeros: none, one or two of four.
SUPPORTS = [support for count in range(3) for support in combinations(range(4), count)]
VALUES = st.one_of(
    st.sampled_from([1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan"), 65504.0, 2.0**-24]),
    st.floats(width=16, allow_subnormal=False).filter(lambda value: value != 0),
)
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A random 2:4 weight `[..., N, K]`: any K divisible by 4, expert axis or not, special values."""
    dtype = draw(st.sampled_from(DTYPES))
    lead = draw(st.sampled_from([(1,), (3,), (2, 1), (2, 3)]))
    groups = draw(st.integers(1, 5))
    weight = torch.zeros(*lead, groups, 4, dtype=dtype)
    for group in weight.view(-1, 4):
        for position in draw(st.sampled_from(SUPPORTS)):
            group[position] = draw(VALUES)
    return weight.flatten(-2)


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A seeded 2:4 weight with exactly two non-zeros per group."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(shape, generator=generator) + 0.5
    order = torch.rand(shape, generator=generator).unflatten(-1, (-1, 4)).argsort(-1)
    return torch.where((order < 2).flatten(-2), dense, 0.0).to(dtype)


def encode(weight: Tensor) -> tuple[list[int], list[int]]:
    """The docstring's layout, one group at a time: bit patterns of `values` and bytes of `meta`, flat."""
    values: list[int] = []
    meta: list[int] = []
    bits = to_bits(weight).flatten(0, -2).tolist()
    for row, numbers in zip(bits, weight.float().flatten(0, -2).tolist(), strict=True):
        nibbles = []
        for start in range(0, len(row), 4):
            kept = [p for p in range(4) if numbers[start + p] != 0]
            kept += [p for p in range(4) if p not in kept][: 2 - len(kept)]
            low, high = sorted(kept)
            values += [row[start + low], row[start + high]]
            nibbles.append(low + 4 * high)
        if len(nibbles) % 2:
            nibbles.append(0)
        meta += [low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
    return values, meta


def to_bits(tensor: Tensor) -> Tensor:
    """The bit patterns of `tensor`. NaNs share one: on a CPU torch gathers bf16 through fp32."""
    return tensor.masked_fill(tensor.isnan(), float("nan")).view(BITS[tensor.dtype.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two floating-point tensors have one dtype and shape and are equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(to_bits(a), to_bits(b))


@given(weights())
@examples
def test_unpacking_restores_every_bit(weight: Tensor) -> None:
    values, meta = two_four.pack(weight)
    two_four.validate(values, meta, tuple(weight.shape))
    assert {"values": tuple(values.shape), "meta": tuple(meta.shape)} == two_four.packed_shapes(tuple(weight.shape))
    assert same_bits(two_four.unpack(values, meta), weight)


@given(weights())
@examples
def test_packing_is_canonical(weight: Tensor) -> None:
    values, meta = two_four.pack(weight)
    again_values, again_meta = two_four.pack(two_four.unpack(values, meta))
    assert same_bits(again_values, values)
    assert torch.equal(again_meta, meta)


@given(weights())
@examples
def test_layout_is_the_documented_one(weight: Tensor) -> None:
    values, meta = two_four.pack(weight)
    expected_values, expected_meta = encode(weight)
    assert to_bits(values).flatten().tolist() == expected_values
    assert meta.flatten().tolist() == expected_meta


def test_layout_by_example() -> None:
    #                        p0=1, p1=3  p0=0, p1=1  p0=0, p1=2 (a zero beside the one non-zero)
    weight = torch.tensor([[0.0, 5, 0, 6, 7, 8, 0, 0, 0, 0, 9, 0]])
    values, meta = two_four.pack(weight)
    assert values.tolist() == [[5, 6, 7, 8, 0, 9]]
    assert meta.tolist() == [[0b0100_1101, 0b0000_1000]]


def test_an_all_zero_group_keeps_the_two_lowest_positions() -> None:
    values, meta = two_four.pack(torch.zeros(2, 8))
    assert not values.any()
    assert meta.tolist() == [[0b0100_0100]] * 2


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", range(4))
def test_a_single_special_value_survives(special: float, position: int) -> None:
    weight = torch.zeros(1, 4)
    weight[0, position] = special
    assert same_bits(two_four.unpack(*two_four.pack(weight)), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (16, 64), (3, 5, 24)])
def test_16_bit_weights_take_nine_sixteenths(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    values, meta = two_four.pack(weight)
    assert 16 * (values.nbytes + meta.nbytes) == 9 * weight.nbytes


@pytest.mark.parametrize("shape", [(4, 64), (3, 5, 12)])
def test_views_pack_like_their_copies(shape: tuple[int, ...]) -> None:
    weight = random_weight(shape, torch.float32)
    view = torch.stack((weight, torch.ones_like(weight)), dim=-1)[..., 0]
    assert not view.is_contiguous()
    for tensor, expected in zip(two_four.pack(view), two_four.pack(weight), strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 10, 577])
def test_input_sizes_of_partial_groups_are_refused(k: int) -> None:
    with pytest.raises(FormatError, match=f"divisible by 4, got K = {k}"):
        two_four.pack(torch.zeros(2, k))
    with pytest.raises(FormatError, match=f"divisible by 4, got K = {k}"):
        two_four.packed_shapes((2, k))


@pytest.mark.parametrize("count", [3, 4])
def test_groups_with_too_many_non_zeros_are_refused_and_located(count: int) -> None:
    weight = torch.zeros(2, 3, 16)
    weight[1, 2, 8 : 8 + count] = 1
    with pytest.raises(FormatError, match=r"1 groups have more than 2 non-zeros; the first is row \[1, 2\], group 2"):
        two_four.pack(weight)


def test_not_a_number_counts_as_non_zero() -> None:
    with pytest.raises(FormatError, match="more than 2 non-zeros"):
        two_four.pack(torch.tensor([[float("nan"), 1.0, float("nan"), 0.0]]))


@pytest.mark.parametrize(
    ("values", "meta", "named"),
    [
        ((3, 8), (3, 2), None),
        ((3, 7), (3, 2), "values"),
        ((2, 8), (3, 2), "values"),
        ((1, 3, 8), (3, 2), "values"),
        ((3, 16), (3, 2), "values"),
        ((3, 8), (3, 1), "meta"),
        ((3, 8), (3, 4), "meta"),
        ((3, 8), (2, 2), "meta"),
        ((3, 8), (6,), "meta"),
    ],
)
def test_shapes_are_checked(values: tuple[int, ...], meta: tuple[int, ...], named: str | None) -> None:
    tensors = torch.zeros(values), torch.full(meta, 0b0100_0100, dtype=torch.uint8)
    if named is None:
        two_four.validate(*tensors, (3, 16))
    else:
        with pytest.raises(FormatError, match=f"^{named} has shape"):
            two_four.validate(*tensors, (3, 16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
def test_values_must_be_floating_point(dtype: torch.dtype) -> None:
    _, meta = two_four.pack(torch.zeros(1, 8))
    with pytest.raises(FormatError, match="values must be floating point"):
        two_four.validate(torch.zeros(1, 4, dtype=dtype), meta, (1, 8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.float32, torch.bool])
def test_meta_must_be_uint8(dtype: torch.dtype) -> None:
    values, meta = two_four.pack(torch.zeros(1, 8))
    with pytest.raises(FormatError, match="meta must be uint8"):
        two_four.validate(values, meta.to(dtype), (1, 8))


@pytest.mark.parametrize("nibble", [p0 | p1 << 2 for p0 in range(4) for p1 in range(4) if p0 >= p1])
@pytest.mark.parametrize("group", range(5))
def test_positions_out_of_order_are_refused_and_located(group: int, nibble: int) -> None:
    values, meta = two_four.pack(torch.zeros(2, 20))
    shift = 4 * (group % 2)
    meta[1, group // 2] = (int(meta[1, group // 2]) & ~(15 << shift)) | nibble << shift
    with pytest.raises(FormatError, match=rf"out of order in row \[1\], group {group}"):
        two_four.validate(values, meta, (2, 20))


@pytest.mark.parametrize("padding", range(1, 16))
def test_padding_must_be_zero(padding: int) -> None:
    values, meta = two_four.pack(torch.zeros(2, 12))
    meta[1, 1] |= padding << 4
    with pytest.raises(FormatError, match="non-zero padding"):
        two_four.validate(values, meta, (2, 12))


def test_every_meta_byte_is_refused_or_stays_inside_its_groups() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    accepted = set()
    for byte in range(256):
        meta = torch.tensor([[byte]], dtype=torch.uint8)
        positions = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6]
        try:
            two_four.validate(values, meta, (1, 8))
        except FormatError:
            assert positions[0] >= positions[1] or positions[2] >= positions[3], f"{byte:#04x} is fine"
            continue
        accepted.add(byte)
        expected = [0.0] * 8
        for value, position in zip((1.0, 2.0, 3.0, 4.0), positions, strict=True):
            expected[position if value < 3 else 4 + position] = value
        assert sorted(expected) == [0, 0, 0, 0, 1, 2, 3, 4]
        assert two_four.unpack(values, meta).tolist() == [expected]
    assert len(accepted) == 36  # six pairs of positions for each of two groups


def test_every_last_byte_of_an_odd_row_is_refused_or_stays_inside_its_group() -> None:
    values = torch.tensor([[1.0, 2.0]])
    accepted = {}
    for byte in range(256):
        meta = torch.tensor([[byte]], dtype=torch.uint8)
        try:
            two_four.validate(values, meta, (1, 4))
        except FormatError:
            continue
        accepted[byte] = two_four.unpack(values, meta)[0].tolist()
    assert accepted == {
        p0 | p1 << 2: [float((p == p0) + 2 * (p == p1)) for p in range(4)] for p0, p1 in combinations(range(4), 2)
    }
