"""The quantized formats: exact round trips, documented bytes, exact zeros, and a guard against hostile files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import (
    FormatError,
    groups,
    groups_layer,
    input_select,
    integers,
    two_four_int4,
)
from halfweight.triton_kernels.formats.bits import from_bits, pack_nibbles, to_bits, unpack_nibbles
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


# ---- groups


@st.composite
def kept_groups(draw: st.DrawFn) -> tuple[KeptGroups, int, int]:
    group_size, segments = draw(st.sampled_from(groups.SIZES)), draw(st.sampled_from(groups.SEGMENTS))
    per_segment = draw(st.integers(1, 5))
    columns = group_size * segments * per_segment
    if segments == 1:
        columns -= draw(st.integers(0, group_size - 1))
    kept = segments * draw(st.integers(0, per_segment))
    rows = (*draw(LEADS), draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return random_groups(rows, columns, group_size, kept, segments, generator), columns, segments


@given(kept_groups())
@examples
def test_groups_round_trip(case: tuple[KeptGroups, int, int]) -> None:
    entries, columns, segments = case
    *rows, kept, group_size = entries.codes.shape
    packed = groups.pack(entries, columns, segments=segments)
    shapes = groups.packed_shapes((*rows, columns), group_size=group_size, kept=kept, segments=segments)
    assert {k: tuple(v.shape) for k, v in packed._asdict().items()} == shapes
    groups.validate(packed, (*rows, columns), group_size=group_size, kept=kept, segments=segments)
    again = groups.unpack(packed, columns, segments=segments)
    assert same(again[1:], entries[1:])
    inside = entries.numbers[..., None] * group_size + torch.arange(group_size) < columns
    assert torch.equal(again.codes[inside], entries.codes[inside])
    assert same(groups.pack(again, columns, segments=segments), packed)
    assert entries.zeros is not None
    expected = torch.zeros(*rows, -(-columns // group_size) * group_size, dtype=torch.float64)
    for where in torch.cartesian_prod(*(torch.arange(n) for n in (*rows, kept)), torch.tensor([0])).tolist():
        entry = tuple(where[:-1])
        start = int(entries.numbers[entry]) * group_size
        numbers = entries.codes[entry].double() - float(entries.zeros[entry])
        expected[(*entry[:-1], slice(start, start + group_size))] = numbers * float(entries.scales[entry])
    dense = groups.dequantize(packed, columns, segments=segments, dtype=torch.float64)
    assert torch.equal(dense, expected[..., :columns])


def test_groups_have_the_documented_bytes() -> None:
    codes = torch.arange(8, dtype=torch.uint8).expand(1, 2, 8).clone()
    scales, zeros = torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.tensor([[3, 15]], dtype=torch.uint8)
    packed = groups.pack(KeptGroups(codes, scales, zeros, torch.tensor([[1, 2]])), 32, segments=2)
    assert packed.codes.tolist() == [[[0x10, 0x32, 0x54, 0x76]] * 2]
    assert packed.scales.tolist() == [[0x3C00, 0x4000]]
    assert packed.index.tolist() == [[1 | 3 << 12, (0 | 15 << 12) - 2**16]]


def test_symmetric_groups_store_the_middle_code() -> None:
    entries = KeptGroups(
        torch.full((1, 1, 8), 8, dtype=torch.uint8), torch.ones(1, 1).half(), None, torch.tensor([[0]])
    )
    packed = groups.pack(entries, 8)
    assert not groups.dequantize(packed, 8).any()
    assert packed.index.view(torch.uint16).tolist() == [[8 << 12]]


def groups_case() -> groups.Groups:
    """3 rows, 60 columns in groups of 8, 4 kept including the padded last one of row 0."""
    entries = random_groups((3,), 60, 8, 4, 1, torch.Generator().manual_seed(3))
    entries.numbers[0] = torch.tensor([0, 2, 5, 7])
    return groups.pack(entries, 60)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p._replace(codes=p.codes[:, 1:]), "codes has shape"),
        (lambda p: p._replace(index=p.index[1:]), "index has shape"),
        (lambda p: p._replace(index=p.index.int()), "index must be int16"),
        (lambda p: poke(p, "scales", (2, 3), 0x7C01), "finite"),
        (lambda p: poke(p, "scales", (2, 3), -1), "finite"),
        (lambda p: poke(p, "index", (0, 3), 8), "past 7"),
        (lambda p: poke(p, "index", (0, 3), -1), "past 7"),
        (lambda p: poke(p, "index", (0, 1), 0x7000), "ascending"),
        (lambda p: poke(p, "index", (0, 1), 5), "ascending"),
        (lambda p: poke(p, "codes", (0, 3, 3), int(p.codes[0, 3, 3]) ^ 0x10), "padding"),
    ],
)
def test_hostile_groups_are_refused(damage: Any, message: str) -> None:
    packed = groups_case()
    groups.validate(packed, (3, 60), group_size=8, kept=4)
    with pytest.raises(FormatError, match=message):
        groups.validate(damage(packed), (3, 60), group_size=8, kept=4)


def test_segments() -> None:
    assert groups.choose_segments(1024, 16, 32) == 8
    assert groups.choose_segments(576, 16, 18) == 2
    assert groups.choose_segments(576, 16, 17) == 1
    assert groups.choose_segments(40, 16, 2) == 1
    for shape, kept, segments in (((1, 64), 4, 3), ((1, 64), 3, 2), ((1, 56), 2, 2)):
        with pytest.raises(FormatError, match="segments do not split"):
            groups.packed_shapes(shape, group_size=8, kept=kept, segments=segments)
    for shape, kept, message in (((1, 64), 9, "cannot keep"), ((1, 8 * 4097), 1, "counts to 4096")):
        with pytest.raises(FormatError, match=message):
            groups.packed_shapes(shape, group_size=8, kept=kept)
    with pytest.raises(FormatError, match="got 4"):
        groups.packed_shapes((1, 64), group_size=4, kept=1)
    # an index that is fine for the row is refused when it leaves its segment
    entries = random_groups((2,), 64, 8, 4, 2, torch.Generator().manual_seed(0))
    packed = groups.pack(entries, 64, segments=2)
    with pytest.raises(FormatError, match="past 3"):
        groups.validate(poke(packed, "index", (1, 1), 4), (2, 64), group_size=8, kept=4, segments=2)


# ---- groups, layer balance


@st.composite
def layer_groups(draw: st.DrawFn) -> tuple[KeptGroups, Tensor, int]:
    group_size, total = draw(st.sampled_from(groups.SIZES)), draw(st.integers(1, 5))
    columns = group_size * total - draw(st.integers(0, group_size - 1))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=total, max_size=total), min_size=1, max_size=5))
    kept = torch.tensor(rows)
    start = torch.cat((torch.zeros(1), kept.sum(-1).cumsum(0))).int()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    count = int(kept.sum())
    codes, zeros = random_bytes((count, group_size), 16, generator), random_bytes((count,), 16, generator)
    return KeptGroups(codes, random_scales((count,), generator), zeros, kept.nonzero()[:, 1]), start, columns


@given(layer_groups())
@examples
def test_layer_groups_round_trip(case: tuple[KeptGroups, Tensor, int]) -> None:
    entries, start, columns = case
    packed = groups_layer.pack(entries, start, columns)
    again, rows = groups_layer.unpack(packed)
    assert torch.equal(rows, start) and same(again[1:], entries[1:])
    assert same(groups_layer.pack(again, rows, columns), packed)
    dense = groups_layer.dequantize(packed, columns)
    assert dense.shape == (len(start) - 1, columns)
    for row, (low, high) in enumerate(zip(start.tolist()[:-1], start.tolist()[1:], strict=True)):
        one = groups.Groups(*(t[None, low:high] for t in packed.entries))
        assert torch.equal(groups.dequantize(one, columns)[0], dense[row])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: poke(p, "row_start", 0, 1), "run from 0 to 4"),
        (lambda p: poke(p, "row_start", 3, 5), "run from 0 to 4"),
        (lambda p: poke(p, "row_start", 1, 3), "below the one before"),
        (lambda p: poke(p, "row_start", 1, -1), "index has an entry|row_start has an entry"),
        (lambda p: p._replace(row_start=p.row_start.long()), "row_start must be int32"),
        (lambda p: poke(p, "index", 3, 3), "past 2"),
        (lambda p: poke(p, "index", 1, 0), "ascending"),
        (lambda p: poke(p, "scales", 1, 0x7C00), "finite"),
        (lambda p: poke(p, "codes", (3, 3), int(p.codes[3, 3]) ^ 0x10), "padding"),
    ],
)
def test_hostile_layer_groups_are_refused(damage: Any, message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    entries = KeptGroups(
        random_bytes((4, 8), 16, generator),
        random_scales((4,), generator),
        random_bytes((4,), 16, generator),
        torch.tensor([0, 1, 0, 2]),
    )
    packed = groups_layer.pack(entries, torch.tensor([0, 2, 2, 4], dtype=torch.int32), 20)
    groups_layer.validate(packed, (3, 20), group_size=8, kept=4)
    with pytest.raises(FormatError, match=message):
        groups_layer.validate(damage(packed), (3, 20), group_size=8, kept=4)


def test_layer_groups_have_no_leading_axes() -> None:
    with pytest.raises(FormatError, match="one matrix"):
        groups_layer.packed_shapes((2, 3, 16), group_size=8, kept=1)
    with pytest.raises(FormatError, match="cannot keep"):
        groups_layer.packed_shapes((2, 16), group_size=8, kept=5)


# ---- input selection


def test_input_selection() -> None:
    packed = input_select.InputSelection(
        to_bits(torch.tensor([0.0, 1.5])), to_bits(torch.rand(2, 6)), torch.zeros(2, 6, 3), torch.zeros(5, 3)
    )
    options: dict[str, Any] = {"parts": 2, "norms": True, "rank": 3}
    input_select.validate(packed, (5, 6), **options)
    for bad, message in (
        (poke(packed, "thresholds", 0, 0x7FC00000), "thresholds has an entry"),
        (poke(packed, "norms", (1, 2), -1), "norms has an entry"),
        (packed._replace(norms=None), "norms is missing"),
        (packed._replace(V=torch.zeros(1, 6, 3)), "V has shape"),
        (packed._replace(U=torch.zeros(5, 3, dtype=torch.int8)), "U must be floating"),
        (packed._replace(thresholds=torch.zeros(2)), "thresholds must be int32"),
    ):
        with pytest.raises(FormatError, match=message):
            input_select.validate(bad, (5, 6), **options)
    with pytest.raises(FormatError, match="V is not part"):
        input_select.validate(packed, (5, 6), parts=2, norms=True)
