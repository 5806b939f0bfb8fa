"""Storage of whole groups and of input selection: round trips, documented bytes, hostile tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfweight.triton_kernels.formats import (
    FormatError,
    groups,
    groups_layer,
    input_select,
)
from halfweight.triton_kernels.formats.bits import to_bits
from halfweight.triton_kernels.formats.groups import KeptGroups
from packed import LEADS, examples, poke, random_bytes, random_groups, random_scales, same

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
