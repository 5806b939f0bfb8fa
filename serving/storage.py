"""From a scheme to stored tensors and back: the one place that knows which format module serves which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..triton_kernels.formats import (
    FormatError,
    groups,
    groups_layer,
    input_select,
    integers,
    two_four,
    two_four_int4,
)
from ..triton_kernels.formats.bits import check_tensor, to_bits
from ..triton_kernels.formats.groups import Groups, KeptGroups
from ..triton_kernels.formats.groups_layer import LayerGroups
from ..triton_kernels.formats.input_select import InputSelection
from ..triton_kernels.formats.integers import Integers, Quantized
from ..triton_kernels.formats.two_four_int4 import TwoFourInt4
from ..triton_kernels.weight import Weight
from .scheme import IntegerScheme, LinearScheme, LowRankScheme

Shape = tuple[int, int]
Form = TypeVar("Form", bound=tuple[Any, ...])
_META = {"codes": torch.uint8, "zeros": torch.uint8, "meta": torch.uint8, "row_start": torch.int32}
_BITS16 = {"scales": torch.int16, "index": torch.int16}
_BITS32 = {"thresholds": torch.int32, "norms": torch.int32, "counts": torch.int32}


class Selection(NamedTuple):
    """Which inputs a linear `[N, K]` reads, before packing: `|x| > threshold`, or `|x| * norms[K] > threshold`.

    `v` `[K, rank]` and `u` `[N, rank]`, in the model's dtype: the branch for the inputs that are not read, if any.
    `inputs`, instead of a threshold: how many inputs each token reads, those with its, or its prompt's, largest scores.
    """

    threshold: float | None
    norms: Tensor | None = None
    v: Tensor | None = None
    u: Tensor | None = None
    inputs: int | None = None


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor; dtype None is the model's own."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def tensor_specs(scheme: LinearScheme, shape: Shape) -> dict[str, TensorSpec]:
    """Stored tensors of a linear `[N, K]` (without its bias) by suffix. Raises FormatError when they cannot fit."""
    return {**weight_specs(scheme, shape), **_branch_specs(scheme.added_branch, shape)}


def _branch_specs(branch: LowRankScheme | None, shape: Shape) -> dict[str, TensorSpec]:
    if branch is None:
        return {}
    (n, k), rank = shape, branch.rank
    _require_rank(branch, shape)
    if branch.parts is None:
        return {"V": TensorSpec((1, k, rank), None), "U": TensorSpec((n, rank), None)}
    parts = {"V": weight_specs(branch.parts[0], (rank, k)), "U": weight_specs(branch.parts[1], (n, rank))}
    return {f"{part}.{name}": spec for part, specs in parts.items() for name, spec in specs.items()}


def weight_specs(scheme: LinearScheme, shape: Shape) -> dict[str, TensorSpec]:
    """As `tensor_specs`, without those of a low-rank branch for all inputs."""
    shapes: dict[str, tuple[int, ...]]
    transposed = (shape[1], shape[0])
    match scheme.storage:
        case "two_four":
            shapes = two_four.packed_shapes(shape)
        case "integers":
            shapes = integers.packed_shapes(shape, **_code_settings(scheme))
        case "two_four_int4":
            shapes = two_four_int4.packed_shapes(shape, **_code_settings(scheme, "bits"))
        case "groups":
            size, kept = _groups(scheme)
            shapes = groups.packed_shapes(shape, group_size=size, kept=kept, segments=scheme.segments)
        case "groups_layer":
            size, kept = _groups(scheme)
            shapes = groups_layer.packed_shapes(shape, group_size=size, kept=kept)
        case "dense":
            shapes = {"weight": shape}
        case "transposed":
            shapes = {"weight_t": transposed}
        case "transposed_integers":
            shapes = integers.packed_shapes(transposed, **_code_settings(scheme))
        case "transposed_groups":
            size, kept = _groups(scheme)
            shapes = groups.packed_shapes(transposed, group_size=size, kept=kept)
    if scheme.selection is not None:
        if scheme.low_rank is not None:
            _require_rank(scheme.low_rank, shape)
        shapes |= input_select.packed_shapes(shape, **_selection_settings(scheme))
    dtypes = _META | _BITS16 | _BITS32
    return {name: TensorSpec(shape, dtypes.get(name)) for name, shape in shapes.items()}


def stored_bits(scheme: LinearScheme, shape: Shape, dtype: torch.dtype) -> int:
    """Bits that the weight of a linear `[N, K]` takes on disk, scales, metadata and padding included."""
    specs = tensor_specs(scheme, shape).values()
    return sum(8 * prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in specs)


def validate(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: Shape) -> None:
    """Raise FormatError unless `tensors` are a valid stored form of a linear `[N, K]`, a branch for all inputs apart;
    later reads are safe then."""
    transposed = (shape[1], shape[0])
    match scheme.storage:
        case "two_four":
            two_four.validate(tensors["values"], tensors["meta"], shape)
        case "integers":
            integers.validate(_as(Integers, tensors), shape, **_code_settings(scheme))
        case "two_four_int4":
            two_four_int4.validate(_as(TwoFourInt4, tensors), shape, **_code_settings(scheme, "bits"))
        case "groups":
            size, kept = _groups(scheme)
            packed = _as(Groups, tensors)
            groups.validate(packed, shape, group_size=size, kept=kept, segments=scheme.segments)
        case "groups_layer":
            size, kept = _groups(scheme)
            groups_layer.validate(_as(LayerGroups, tensors), shape, group_size=size, kept=kept)
        case "dense":
            _check_floating("weight", tensors["weight"], shape)
        case "transposed":
            _check_floating("weight_t", tensors["weight_t"], transposed)
        case "transposed_integers":
            integers.validate(_as(Integers, tensors), transposed, **_code_settings(scheme))
        case "transposed_groups":
            size, kept = _groups(scheme)
            groups.validate(_as(Groups, tensors), transposed, group_size=size, kept=kept)
    if scheme.selection is not None:
        input_select.validate(_as(InputSelection, tensors), shape, **_selection_settings(scheme))


def dense_weight(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The dense weight `[N, K]` with its zeros, in `dtype`: exact in fp32, rounded once to a narrower dtype.

    A low-rank branch is no part of it; see `effective_weight`. With a selection, it is for the inputs that are read.
    """
    n = shape[0]
    match scheme.storage:
        case "two_four":
            return two_four.unpack(tensors["values"], tensors["meta"]).to(dtype)
        case "integers":
            settings = _code_settings(scheme, "symmetric")
            return integers.dequantize(_as(Integers, tensors), columns=shape[1], dtype=dtype, **settings)
        case "two_four_int4":
            size = _integers(scheme).group_size
            packed = _as(TwoFourInt4, tensors)
            return two_four_int4.dequantize(packed, group_size=size, columns=shape[1], dtype=dtype)
        case "groups":
            return groups.dequantize(_as(Groups, tensors), shape[1], segments=scheme.segments, dtype=dtype)
        case "groups_layer":
            return groups_layer.dequantize(_as(LayerGroups, tensors), shape[1], dtype=dtype)
        case "dense":
            return tensors["weight"].to(dtype)
        case "transposed":
            return tensors["weight_t"].to(dtype).T
        case "transposed_integers":
            settings = _code_settings(scheme, "symmetric")
            return integers.dequantize(_as(Integers, tensors), columns=n, dtype=dtype, **settings).T
        case "transposed_groups":
            return groups.dequantize(_as(Groups, tensors), n, dtype=dtype).T


def effective_weight(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """The dense weight `[N, K]` plus, where all inputs pass through it, the low-rank branch's share, in `dtype`."""
    branch = scheme.added_branch
    if branch is None:
        return dense_weight(scheme, tensors, shape, dtype)
    (n, k), rank = shape, branch.rank
    if branch.parts is None:
        v, u = tensors["V"][0].float(), tensors["U"].float()
    else:
        v_tensors, u_tensors = (
            {name[2:]: tensor for name, tensor in tensors.items() if name.startswith(part)} for part in ("V.", "U.")
        )
        v = dense_weight(branch.parts[0], v_tensors, (rank, k), torch.float32).T
        u = dense_weight(branch.parts[1], u_tensors, (n, rank), torch.float32)
    return dense_weight(scheme, tensors, shape, torch.float32).addmm_(u, v.T).to(dtype)


def pack_branch(
    branch: LowRankScheme, v: Tensor, u: Tensor, quantized: tuple[Quantized, Quantized] | None
) -> dict[str, Tensor]:
    """Tensors to store for a branch `V` `[K, rank]`, `U` `[N, rank]`; with integers, the codes of V^T and U."""
    if branch.parts is None:
        return {"V": v[None].contiguous(), "U": u}
    if quantized is None:
        raise FormatError(f"a branch of {branch} needs codes and scales")
    parts = zip("VU", (v.T, u), branch.parts, quantized, strict=True)
    return {
        f"{part}.{name}": tensor
        for part, dense, scheme, codes in parts
        for name, tensor in pack_weight(dense, scheme, codes).items()
    }


def weight_of(scheme: LinearScheme, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Weight:
    """The stored tensors of a linear `[N, K]` in a model of `dtype`, as the kernels take them."""

    def expand(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return dense_weight(scheme, tensors, shape, dtype)

    return Weight(scheme.op, tensors, shape, settings_of(scheme), dtype, expand)


def settings_of(scheme: LinearScheme) -> dict[str, int]:
    """What the kernels need to know about a scheme beside its op."""
    settings = {} if scheme.integers is None else _code_settings(scheme)
    if scheme.input_major:
        settings["selects"] = scheme.selection is not None
    elif scheme.group is not None:
        settings |= {"segments": scheme.segments, "layer": scheme.balance == "layer"}
    return settings


def pack_weight(
    weight: Tensor, scheme: LinearScheme, quantized: Quantized | None = None, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors to store for a solved linear, by suffix.

    16-bit schemes store `weight` `[N, K]`. Integer schemes store `quantized` (codes and scales per group of dense
    inputs) under the bool `mask` `[N, K]` of kept weights (None: all), not `weight`; with integers along outputs it is
    W^T that is quantized: codes `[K, N]`, scales and zeros `[K, J]`. What a selection reads by is packed by
    `pack_selection`. Raises FormatError off the pattern.
    """
    if scheme.storage == "transposed":
        return {"weight_t": weight.T.contiguous()}
    if scheme.storage == "two_four":
        values, meta = two_four.pack(weight)
        return {"values": values, "meta": meta}
    if scheme.integers is None:
        return {"weight": weight}
    if quantized is None:
        raise FormatError(f"{scheme.numbers} weights need codes and scales")
    codes, scales, zeros = quantized
    if mask is None:
        kept = torch.ones_like(codes, dtype=torch.bool)
    else:
        kept = mask.T if scheme.input_major else mask
    bits, size = scheme.integers.bits, scheme.integers.group_size
    packed: NamedTuple
    if scheme.group is not None:
        packed = _pack_groups(quantized, kept, scheme)
    elif scheme.storage == "two_four_int4":
        packed = two_four_int4.pack(quantized, kept, group_size=size)
    else:
        spread = torch.arange(codes.shape[1], device=codes.device) // size
        middle = torch.full_like(codes, integers.middle(bits)) if zeros is None else zeros[:, spread]
        packed = integers.pack(Quantized(torch.where(kept, codes, middle), scales, zeros), bits=bits, group_size=size)
    return {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}


def pack_selection(scheme: LinearScheme, selection: Selection) -> dict[str, Tensor]:
    """Tensors to store beside a weight whose inputs are selected. Raises FormatError when they are not the scheme's."""
    norms = None if selection.norms is None else to_bits(selection.norms.float())[None]
    v = None if selection.v is None else selection.v[None].contiguous()
    cut, number = selection.threshold, selection.inputs
    threshold = None if cut is None else to_bits(torch.tensor([cut], dtype=torch.float32))
    count = None if number is None else torch.tensor([number], dtype=torch.int32)
    packed = InputSelection(threshold, norms, v, selection.u, count)
    found = {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}
    if set(found) != set(input_select.packed_shapes((1, 1), **_selection_settings(scheme))):
        raise FormatError(f"a selection of {', '.join(found)} is not one of {scheme.numbers}")
    return found


def selection_of(scheme: LinearScheme, tensors: Mapping[str, Tensor]) -> InputSelection | None:
    """What the linear reads by, as it is stored; None when it reads every input."""
    return None if scheme.selection is None else _as(InputSelection, tensors)


def _pack_groups(quantized: Quantized, mask: Tensor, scheme: LinearScheme) -> Groups | LayerGroups:
    """Kept groups of dense `quantized` `[N, K]`; the groups with any weight in `mask` are the kept ones."""
    codes, scales, zeros = quantized
    size, kept = _groups(scheme)
    rows, columns = codes.shape
    padding = -columns % size
    codes, mask = (torch.nn.functional.pad(part, (0, padding)) for part in (codes, mask))
    alive = mask.unflatten(1, (-1, size)).any(-1)  # [N, groups]
    if int(alive.sum()) != (kept if scheme.balance == "layer" else kept * rows):
        raise FormatError(f"the mask keeps {int(alive.sum())} groups, which is not what the scheme says")
    row, number = alive.nonzero(as_tuple=True)
    entries = KeptGroups(
        codes.unflatten(1, (-1, size))[row, number],
        scales[row, number],
        None if zeros is None else zeros[row, number],
        number,
    )
    if scheme.balance == "layer":
        counts = torch.nn.functional.pad(alive.sum(1), (1, 0))
        return groups_layer.pack(entries, counts.cumsum(0).to(torch.int32), columns)
    if bool((alive.sum(1) != kept).any()):
        raise FormatError(f"every row must keep {kept} groups")
    by_row: list[Any] = [None if part is None else part.unflatten(0, (rows, kept)) for part in entries]
    return groups.pack(KeptGroups(*by_row), columns, segments=scheme.segments)


def _check_floating(name: str, tensor: Tensor, shape: Shape) -> None:
    check_tensor(name, tensor, shape, tensor.dtype)
    if not tensor.dtype.is_floating_point:
        raise FormatError(f"{name} must be floating point, got {tensor.dtype}")


def _require_rank(branch: LowRankScheme, shape: Shape) -> None:
    if branch.rank > min(shape):
        raise FormatError(f"a branch of rank {branch.rank} is larger than a linear {list(shape)}")


def _code_settings(scheme: LinearScheme, *without: str) -> dict[str, Any]:
    """The integers' settings as the formats name them."""
    return _integers(scheme).model_dump(exclude={"along", *without})


def _selection_settings(scheme: LinearScheme) -> dict[str, Any]:
    assert scheme.selection is not None  # callers have looked
    rank = 0 if scheme.low_rank is None else scheme.low_rank.rank
    return {"norms": scheme.selection.norms, "rank": rank, "topk": scheme.selection.threshold != "fixed"}


def _integers(scheme: LinearScheme) -> IntegerScheme:
    assert scheme.integers is not None  # every storage that asks has checked
    return scheme.integers


def _groups(scheme: LinearScheme) -> tuple[int, int]:
    assert scheme.group is not None and scheme.kept is not None
    return scheme.group, scheme.kept


def _as(form: type[Form], tensors: Mapping[str, Tensor]) -> Form:
    """The format's named tuple of the tensors that a module or file holds by name."""
    fields: Any = form
    values: list[Any] = [tensors.get(name) for name in fields._fields]
    return fields(*values)
