"""Cutting a stored linear `[N, K]` for tensor parallelism, tensor by tensor, without unpacking it.

Every format that stores rows of outputs, but `groups_layer`, cuts along N by plain slicing. Along K, 2:4 cuts at whole
metadata bytes, integers at whole groups and groups at their segments. Input-major formats, W^T `[K, N]`, cut along K by
plain slicing and along N at whole groups; kept groups, which lie anywhere along N, are gathered.

A low-rank branch that is cut along N keeps V whole and cuts U; along K the reverse, so that the summed outputs are
right. A selection looks at each input alone: norms are cut with the inputs, and every part has the threshold. A count
is of all inputs, and is cut along N only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton_kernels.formats import groups
from ..triton_kernels.formats.groups import Groups
from .errors import InputError
from .scheme import IntegerScheme, LinearScheme


def along_rows(scheme: LinearScheme, name: str, tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows `start` to `start + count` of N, of the stored tensor called `name` (such as `codes` or `U.codes`).

    `row_scheme` has said that it can be cut so. Tensors of kept groups along N stay whole, for `gather_groups`.
    """
    if scheme.balance == "layer" and name in ("codes", "scales", "index", "row_start"):
        if start or count != _layer_rows(name, tensor, count):
            raise InputError("balance: layer cannot be cut for tensor parallelism; serve it with size 1")
        return tensor
    axis = rows_axis(scheme, name)
    if axis is None or (axis and scheme.group is not None):
        return tensor
    share = _outputs_per_entry(scheme, name) if axis else 1
    return tensor.narrow(axis, start // share, count // share)


def rows_axis(scheme: LinearScheme, name: str) -> int | None:
    """The axis of the stored tensor called `name` that follows N, if any: 1 of W^T `[K, N-like, ...]`, else 0."""
    if name in ("thresholds", "counts", "norms") or _of_branch(name, "V"):
        return None
    return int(scheme.input_major and not _of_branch(name, "U"))


def stored_rows(scheme: LinearScheme, name: str, tensor: Tensor) -> int | None:
    """Outputs of a stored tensor, with the padding of a last group; None when it does not tell them."""
    axis = rows_axis(scheme, name)
    if axis is None or scheme.balance == "layer" or (axis and scheme.group is not None):
        return None
    return tensor.shape[axis] * (_outputs_per_entry(scheme, name) if axis else 1)


def row_scheme(scheme: LinearScheme, pieces: Sequence[int]) -> LinearScheme:
    """The scheme of a part of N that consists of `pieces`, numbers of outputs; raises InputError when it cannot be cut.

    An input may have all of its kept groups in one part, so that parts keep as many, if they have as many.
    """
    if not scheme.input_major or scheme.integers is None:
        return scheme
    for rows in pieces:
        _check_groups(scheme.integers, rows, paired=scheme.group is None)
    if scheme.group is None or scheme.kept is None:
        return scheme
    return scheme.model_copy(update={"kept": min(scheme.kept, sum(pieces) // scheme.group)})


def gather_groups(
    scheme: LinearScheme, packed: Groups, shape: tuple[int, int], pieces: Sequence[tuple[int, int]]
) -> Groups:
    """What the outputs in `pieces` (start, count; whole groups) hold of a linear `[N, K]`, as `row_scheme` says.

    Dropped groups fill up what an input lacks, with scale 0. Raises FormatError unless `packed` is valid.
    """
    assert scheme.group is not None and scheme.kept is not None  # it has kept groups
    (n, k), size, found = shape, scheme.group, scheme.kept
    groups.validate(packed, (k, n), group_size=size, kept=found)
    kept, device = row_scheme(scheme, [count for _, count in pieces]).kept, packed.index.device
    own = torch.cat([torch.arange(start // size, (start + count) // size, device=device) for start, count in pieces])
    entries = torch.full((k, n // size), found, device=device)  # where each group is stored; `found`: nowhere
    entries.scatter_(1, groups.index_numbers(packed.index), torch.arange(found, device=device).expand(k, -1))
    entries = entries[:, own]
    numbers = (entries == found).sort(dim=1, stable=True).indices[:, :kept].sort(dim=1).values
    place, inputs = entries.gather(1, numbers), torch.arange(k, device=device)[:, None]
    codes, scales, index = (
        torch.cat([tensor, tensor.new_zeros(k, 1, *tensor.shape[2:])], 1)[inputs, place] for tensor in packed
    )
    return Groups(codes, scales, index & ~groups.MAX_NUMBER | numbers.to(index.dtype))


def _outputs_per_entry(scheme: LinearScheme, name: str) -> int:
    """Outputs that one entry along axis 1 of a tensor of W^T stands for."""
    if scheme.integers is None:
        return 1
    bits, size = scheme.integers.bits, scheme.integers.group_size
    return {"codes": 8 // bits, "scales": size, "zeros": size * 8 // bits}[name]


def _of_branch(name: str, half: str) -> bool:
    return name.partition(".")[0] == half


def _layer_rows(name: str, tensor: Tensor, count: int) -> int:
    """The rows of a `groups_layer` tensor where it tells them."""
    return tensor.shape[0] - 1 if name == "row_start" else count


def column_scheme(scheme: LinearScheme, columns: int, size: int) -> LinearScheme:
    """The scheme of one of `size` parts along K = `columns`; raises InputError when the format cannot be cut so."""
    if size == 1:
        return scheme
    if columns % size:
        raise InputError(f"{columns} inputs are not cut into {size} equal parts; use another tensor parallel size")
    if scheme.selection is not None and scheme.selection.threshold != "fixed":
        raise InputError(
            "the inputs of a token with the largest scores are found among all of them, which are not cut; serve"
            f" threshold: {scheme.selection.threshold} with tensor parallel size 1"
        )
    if scheme.low_rank is not None and scheme.low_rank.integers is not None:
        _check_groups(scheme.low_rank.integers, columns // size)
    if scheme.input_major:
        return scheme
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


def _check_groups(integers: IntegerScheme, width: int, paired: bool = True) -> None:
    count = width // integers.group_size
    packed_zeros = paired and not integers.symmetric and integers.bits == 4
    if width % integers.group_size or (packed_zeros and count % 2):
        pairs = "whole pairs of groups" if packed_zeros else "whole groups"
        raise InputError(f"parts of {width} {integers.along} are no {pairs} of {integers.group_size}; use fewer ranks")


def along_columns(scheme: LinearScheme, name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` along K, of the stored tensor called `name`; `column_scheme` has said that it can be."""
    if size == 1 or name == "thresholds" or _of_branch(name, "U"):
        return tensor
    # [N, K-like, ...], or [K, N-like, ...] of W^T; norms are [1, K], V is [1, K, r] and V.codes [r, K-like]
    axis = 0 if rows_axis(scheme, name) == 1 else 1
    count = tensor.shape[axis] // size
    return tensor.narrow(axis, rank * count, count)
