"""Cutting a stored linear `[N, K]` for tensor parallelism, tensor by tensor, without unpacking it.

Every format but `groups_layer` cuts along N by plain slicing. Along K, 2:4 cuts at whole metadata bytes, integers at
whole groups and groups at their segments. A low-rank branch that is cut along N keeps V whole and cuts U; along K the
reverse, so that the summed outputs are right.
"""

from __future__ import annotations

from torch import Tensor

from .errors import InputError
from .scheme import IntegerScheme, LinearScheme


def along_rows(scheme: LinearScheme, name: str, tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows `start` to `start + count` of N, of the stored tensor called `name` (such as `codes` or `U.codes`)."""
    if scheme.balance == "layer" and name in ("codes", "scales", "index", "row_start"):
        if start or count != _layer_rows(name, tensor, count):
            raise InputError("balance: layer cannot be cut for tensor parallelism; serve it with size 1")
        return tensor
    if name == "V" or name.startswith("V."):
        return tensor
    return tensor.narrow(0, start, count)


def _layer_rows(name: str, tensor: Tensor, count: int) -> int:
    """The rows of a `groups_layer` tensor where it tells them."""
    return tensor.shape[0] - 1 if name == "row_start" else count


def column_scheme(scheme: LinearScheme, columns: int, size: int) -> LinearScheme:
    """The scheme of one of `size` parts along K = `columns`; raises InputError when the format cannot be cut so."""
    if size == 1:
        return scheme
    if columns % size:
        raise InputError(f"{columns} inputs are not cut into {size} equal parts; use another tensor parallel size")
    if scheme.low_rank is not None and scheme.low_rank.integers is not None:
        _check_groups(scheme.low_rank.integers, columns // size)
    if scheme.group is not None:
        if scheme.balance == "layer" or scheme.kept is None or scheme.segments % size:
            raise InputError(
                f"rows of {scheme.segments} segments are not cut into {size} parts; use a tensor parallel size that"
                f" divides {scheme.segments}"
            )
        cut = scheme.model_copy(update={"kept": scheme.kept // size, "segments": scheme.segments // size})
        return LinearScheme.model_validate(cut.model_dump())
    if scheme.integers is not None:
        _check_groups(scheme.integers, columns // size)
    if scheme.storage.startswith("two_four") and columns // size % 8:
        raise InputError(f"2:4 metadata is not cut into parts of {columns // size} inputs, no multiple of 8")
    return scheme


def _check_groups(integers: IntegerScheme, columns: int) -> None:
    count = columns // integers.group_size
    packed_zeros = not integers.symmetric and integers.bits == 4
    if columns % integers.group_size or (packed_zeros and count % 2):
        pairs = "whole pairs of groups" if packed_zeros else "whole groups"
        raise InputError(f"parts of {columns} inputs are no {pairs} of {integers.group_size}; use fewer ranks")


def along_columns(scheme: LinearScheme, name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` along K, of the stored tensor called `name`; `column_scheme` has said that it can be."""
    if size == 1 or name == "U" or name.startswith("U."):
        return tensor
    count = tensor.shape[1] // size  # [N, K-like, ...], V is [1, K, r] and V.codes [r, K-like]
    return tensor.narrow(1, rank * count, count)
