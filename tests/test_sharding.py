"""A part of a stored linear is the part of its weight: cutting stored tensors and cutting the dense weight agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfweight.serving.errors import InputError
from halfweight.serving.scheme import LinearScheme
from halfweight.serving.sharding import along_columns, along_rows, column_scheme, gather_groups, row_scheme
from halfweight.serving.storage import effective_weight, validate
from halfweight.triton_kernels.formats.groups import Groups
from stored_linears import SCHEMES, SELECTED, TOPK, WIDE, K, N, integers, packed, run, selected

X = torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def dense(scheme: LinearScheme, tensors: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """The effective weight; what was cut must be a valid form of its scheme, too."""
    validate(scheme, tensors, (rows, columns))
    return effective_weight(scheme, tensors, (rows, columns), torch.float32)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_along_the_inputs_are_columns_of_the_weight(name: str, size: int) -> None:
    scheme, tensors = SCHEMES[name], packed(SCHEMES[name])
    whole = dense(scheme, tensors, N, K)
    cut = column_scheme(scheme, K, size)
    for rank in range(size):
        part = {key: along_columns(cut, key, tensor, rank, size) for key, tensor in tensors.items()}
        width = K // size
        expected = whole[:, rank * width : (rank + 1) * width]
        torch.testing.assert_close(dense(cut, part, N, width), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_along_the_outputs_are_rows_of_the_weight(name: str) -> None:
    scheme, tensors = SCHEMES[name], packed(SCHEMES[name])
    whole = dense(scheme, tensors, N, K)
    for start in (0, 8, 16):
        part = {key: along_rows(scheme, key, tensor, start, 8) for key, tensor in tensors.items()}
        torch.testing.assert_close(dense(scheme, part, 8, K), whole[start : start + 8], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("size", [2, 4])
def test_outputs_of_parts_along_the_inputs_add_up(name: str, size: int) -> None:
    scheme, tensors = SELECTED[name], selected(SELECTED[name])
    cut, width = column_scheme(scheme, K, size), K // size
    total = torch.zeros(len(X), WIDE)
    for rank in range(size):
        part = {key: along_columns(cut, key, tensor, rank, size) for key, tensor in tensors.items()}
        total += run(cut, part, X[:, rank * width : (rank + 1) * width])
    close(total, run(scheme, tensors, X))


@pytest.mark.parametrize("name", SELECTED | TOPK)
@pytest.mark.parametrize("size", [2, 4])
def test_outputs_of_parts_along_the_outputs_stand_side_by_side(name: str, size: int) -> None:
    scheme = (SELECTED | TOPK)[name]
    tensors = selected(scheme)
    width = WIDE // size
    cut = row_scheme(scheme, [width])
    outputs = []
    for start in range(0, WIDE, width):
        part = {key: along_rows(cut, key, tensor, start, width) for key, tensor in tensors.items()}
        if cut.group is not None:
            whole = Groups(*(tensors[key] for key in Groups._fields))
            part |= gather_groups(scheme, whole, (WIDE, K), [(start, width)])._asdict()
        outputs.append(run(cut, part, X, width))
    close(torch.cat(outputs, -1), run(scheme, tensors, X))


@pytest.mark.parametrize(
    ("name", "columns", "size", "hint"),
    [
        ("groups", K, 8, "4 segments"),
        ("2:4", 136, 2, "no multiple of 8"),
        ("2:4", 130, 4, "equal parts"),
        ("int4", 96, 2, "whole pairs of groups"),
        ("int8", 96, 2, "whole groups"),
        ("int4 + rank 8 int4", 192, 4, "whole"),
    ],
)
def test_cuts_that_the_format_does_not_allow_are_refused(name: str, columns: int, size: int, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        column_scheme(SCHEMES[name], columns, size)


@pytest.mark.parametrize(
    ("name", "rows", "hint"),
    [
        ("int4", 24, "parts of 24 outputs are no whole pairs of groups of 8; use fewer ranks"),
        ("int8", 12, "parts of 12 outputs are no whole groups"),
        ("groups", 12, "parts of 12 outputs are no whole groups"),
    ],
)
def test_outputs_are_not_cut_inside_a_group(name: str, rows: int, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        row_scheme(SELECTED[name], [rows])


def test_layer_balanced_groups_are_never_cut() -> None:
    scheme = LinearScheme(pattern="1x16", density=0.5, integers=integers(), kept=96, balance="layer")
    with pytest.raises(InputError, match="segments"):
        column_scheme(scheme, K, 2)
    row_start = torch.zeros(N + 1, dtype=torch.int32)
    assert along_rows(scheme, "row_start", row_start, 0, N) is row_start
    with pytest.raises(InputError, match="balance: layer"):
        along_rows(scheme, "row_start", row_start, 0, N // 2)
