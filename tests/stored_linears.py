"""Random stored linears of every scheme that is served."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import IntegerScheme, LinearScheme, LowRankScheme, SelectionScheme
from halfweight.serving.storage import Selection, pack_branch, pack_selection, pack_weight
from halfweight.triton_kernels.formats.integers import Quantized

N, K = 24, 128


def integers(bits: int = 4, group_size: int = 16, symmetric: bool = False) -> IntegerScheme:
    return IntegerScheme(bits=bits, group_size=group_size, symmetric=symmetric)


def selecting(selection: SelectionScheme, rank: int = 0, **fields: Any) -> LinearScheme:
    """Of a linear that reads by `selection`, 16-bit unless `fields` say otherwise, with a branch of `rank`, if any."""
    branch = LowRankScheme(rank=rank) if rank else None
    return LinearScheme(**{"pattern": "dense", "density": 1, **fields}, selection=selection, low_rank=branch)


SCHEMES = {
    "2:4": LinearScheme(pattern="2:4", density=0.5),
    "int4": LinearScheme(pattern="dense", density=1.0, integers=integers()),
    "int8": LinearScheme(pattern="dense", density=1.0, integers=integers(8, 32, True)),
    "2:4 int4": LinearScheme(pattern="2:4", density=0.5, integers=integers()),
    "groups": LinearScheme(pattern="1x16", density=0.5, integers=integers(), kept=4, segments=4),
    "2:4 + rank 4": LinearScheme(pattern="2:4", density=0.5, low_rank=LowRankScheme(rank=4)),
    "int4 + rank 8 int4": LinearScheme(
        pattern="dense",
        density=1.0,
        integers=integers(),
        low_rank=LowRankScheme(rank=8, integers=integers(4, 32, True)),
    ),
}

WIDE = 64  # outputs of the selected linears: four parts of them are whole pairs of groups
_OUTPUTS = IntegerScheme(group_size=8, along="outputs")
_STORED = {
    "16-bit": LinearScheme(pattern="dense", density=1.0),
    "int4": LinearScheme(pattern="dense", density=1.0, integers=_OUTPUTS),
    "int8": LinearScheme(pattern="dense", density=1.0, integers=_OUTPUTS.model_copy(update={"bits": 8})),
    "groups": LinearScheme(pattern="8x1", density=0.375, integers=_OUTPUTS, kept=3),
}
# Every selected storage with and without norms, with and without a branch.
SELECTED = {
    f"{name}{' norms' * norms}{f' rank {rank}' * bool(rank)}": scheme.model_copy(
        update={
            "selection": SelectionScheme(norms=norms),
            "low_rank": LowRankScheme(rank=rank) if rank else None,
        }
    )
    for name, scheme in _STORED.items()
    for norms in (False, True)
    for rank in (0, 5)
}


# Those whose tokens each read as many inputs: not to be cut along K.
TOPK = {
    f"{name} top-k": scheme.model_copy(
        update={"selection": SelectionScheme(norms=bool(scheme.low_rank), threshold="topk")}
    )
    for name, scheme in SELECTED.items()
    if scheme.selection is not None and not scheme.selection.norms
}


def packed(scheme: LinearScheme, seed: int = 0) -> dict[str, Tensor]:
    """Random stored tensors of a linear `[N, K]`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    mask = torch.ones(N, K, dtype=torch.bool)
    if scheme.pattern == "2:4":
        mask = torch.tensor([True, False, True, False]).repeat(K // 4).expand(N, K).clone()
        mask[::3] = mask[::3].roll(1, 1)
    elif scheme.group is not None:
        mask = torch.zeros(N, K // 16, dtype=torch.bool)
        mask[:, ::2] = True  # one group in each of the four segments of two
        mask[1::2] = mask[1::2].roll(1, 1)
        mask = mask.repeat_interleave(16, 1)
    quantized = None if scheme.integers is None else random_codes(scheme.integers, N, K, generator)
    tensors = pack_weight(weight * mask, scheme, quantized, mask)
    if scheme.low_rank is not None:
        v, u = (
            torch.randn(K, scheme.low_rank.rank, generator=generator),
            torch.randn(N, scheme.low_rank.rank, generator=generator),
        )
        codes = None
        if scheme.low_rank.parts is not None:
            inner, outer = (part.integers for part in scheme.low_rank.parts)
            assert inner is not None
            assert outer is not None
            codes = (
                random_codes(inner, scheme.low_rank.rank, K, generator),
                random_codes(outer, N, scheme.low_rank.rank, generator),
            )
        tensors |= pack_branch(scheme.low_rank, v, u, codes)
    return tensors


def selected(scheme: LinearScheme, seed: int = 0) -> dict[str, Tensor]:
    """Random stored tensors of a linear `[WIDE, K]` that reads a part of normal inputs; its threshold, or count, is the
    seed's."""
    generator = torch.Generator().manual_seed(seed)
    assert scheme.selection is not None
    quantized = None if scheme.integers is None else random_codes(scheme.integers, K, WIDE, generator)
    mask = torch.ones(WIDE, K, dtype=torch.bool)
    if scheme.group is not None:
        order = torch.rand(WIDE // scheme.group, K, generator=generator).argsort(0)
        mask = (order < (scheme.kept or 0)).repeat_interleave(scheme.group, 0)
    rank = 0 if scheme.low_rank is None else scheme.low_rank.rank
    topk = scheme.selection.threshold == "topk"
    chosen = Selection(
        None if topk else 0.4 + 0.3 * seed,
        torch.rand(K, generator=generator) + 0.5 if scheme.selection.norms else None,
        torch.randn(K, rank, generator=generator) if rank else None,
        torch.randn(WIDE, rank, generator=generator) if rank else None,
        K // (2 + seed) if topk else None,
    )
    weight = torch.randn(WIDE, K, generator=generator)
    return pack_weight(weight, scheme, quantized, mask) | pack_selection(scheme, chosen)


def run(scheme: LinearScheme, tensors: dict[str, Tensor], x: Tensor, rows: int = WIDE) -> Tensor:
    """Outputs `[M, rows]` of a stored linear for `x` `[M, K]`; its tensors must be a valid form of the scheme."""
    module = CompressedLinear(scheme, x.shape[-1], rows, False, "meta", torch.float32)
    module.load_state_dict(tensors, assign=True)
    module.check()
    return module(x)


def random_codes(integers: IntegerScheme, rows: int, columns: int, generator: torch.Generator) -> Quantized:
    groups = -(-columns // integers.group_size)
    codes = torch.randint(2**integers.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).half()
    zeros = torch.randint(2**integers.bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return Quantized(codes, scales, None if integers.symmetric else zeros)
