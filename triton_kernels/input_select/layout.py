"""The order of an input-selected linear on the GPU, made once after load, and its inverse.

- `weight[K + r, columns]`: `[Wt; U^T]`, so that the low-rank branch is r more inputs that are always read. Every fused
  part is padded with zero columns to whole tiles of 32.
- `v[K, columns]`: the P matrices `V` `[K, r]` side by side, each padded to whole tiles.
- `tiles[T, 4]`, `v_tiles[T, 4]`, int32: `(part, first output column, end, 0)` of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.bits import from_bits, to_bits
from ..formats.input_select import InputSelection
from .reference import part_columns
from .split import TILE, workspace_size


class Prepared(NamedTuple):
    """One linear `[N, K]` ready for the GPU (see the module's docstring); with experts, tensors lead with `[E, ...]`.

    `thresholds[P]` and `norms[P, K]` fp32; `counts[P]` int32 in place of the thresholds. `workspace` fp32: partial
    sums; launches that share it must not overlap.
    """

    weight: Tensor
    thresholds: Tensor | None
    counts: Tensor | None
    norms: Tensor | None
    v: Tensor | None
    tiles: Tensor
    v_tiles: Tensor
    workspace: Tensor
    n: int
    k: int
    rank: int
    parts: tuple[int, ...]

    def expert(self, index: int) -> Prepared:
        """One expert's linear, as views."""
        return self._replace(
            weight=self.weight[index],
            thresholds=None if self.thresholds is None else self.thresholds[index],
            counts=None if self.counts is None else self.counts[index],
            norms=None if self.norms is None else self.norms[index],
            v=None if self.v is None else self.v[index],
        )


def prepare(
    weight: Tensor,
    selection: InputSelection,
    *,
    parts: Sequence[int] | None = None,
    workspace: Tensor | None = None,
) -> Prepared:
    """GPU order of `weight[..., K, N]` with its validated `selection`; leading axes (experts) belong to every tensor.

    `parts`: output sizes of the fused parts, by default one of N. `workspace`: fp32, at least `workspace_size` numbers,
    to share one between linears; by default a new one.
    """
    k, n = weight.shape[-2:]
    parts = tuple(parts or (n,))
    rank = 0 if selection.V is None else selection.V.shape[-1]
    rows = weight
    if selection.U is not None:
        rows = torch.cat((weight, selection.U.to(weight.dtype).mT), dim=-2)
    v = None
    if selection.V is not None:
        v = pad_parts(selection.V.movedim(-3, -2).flatten(-2), (rank,) * len(parts))
    if workspace is None:
        workspace = torch.empty(workspace_size(n, k, rank, len(parts)), dtype=torch.float32, device=weight.device)
    return Prepared(
        weight=pad_parts(rows, parts),
        thresholds=None if selection.thresholds is None else from_bits(selection.thresholds),
        counts=selection.counts,
        norms=None if selection.norms is None else from_bits(selection.norms),
        v=v,
        tiles=tile_table(parts).to(weight.device),
        v_tiles=tile_table((rank,) * len(parts)).to(weight.device),
        workspace=workspace,
        n=n,
        k=k,
        rank=rank,
        parts=parts,
    )


def restore(prepared: Prepared) -> tuple[Tensor, InputSelection]:
    """Inverse of `prepare`: `(weight, selection)`."""
    rows = drop_padding(prepared.weight, prepared.parts)
    v = u = None
    if prepared.v is not None:
        ranks = (prepared.rank,) * len(prepared.parts)
        v = drop_padding(prepared.v, ranks).unflatten(-1, (len(ranks), prepared.rank)).movedim(-2, -3).contiguous()
        u = rows[..., prepared.k :, :].mT.contiguous()
    return rows[..., : prepared.k, :].contiguous(), selection_of(prepared)._replace(V=v, U=u)


def selection_of(prepared: Prepared) -> InputSelection:
    """What `prepared` reads by, as it is stored, without the branch."""
    thresholds, norms = (
        None if tensor is None else to_bits(tensor) for tensor in (prepared.thresholds, prepared.norms)
    )
    return InputSelection(thresholds, norms, counts=prepared.counts)


def pad_parts(matrix: Tensor, parts: Sequence[int], tile: int = TILE) -> Tensor:
    """`[..., R, sum(parts)]` with zero columns after every part, up to whole tiles."""
    blocks = [
        torch.nn.functional.pad(matrix[..., columns], (0, -parts[part] % tile)) for part, columns in part_columns(parts)
    ]
    return torch.cat(blocks, dim=-1).contiguous()


def drop_padding(matrix: Tensor, parts: Sequence[int], tile: int = TILE) -> Tensor:
    """Inverse of `pad_parts`."""
    blocks = [
        matrix[..., columns][..., :size] for size, columns in zip(parts, padded_columns(parts, tile), strict=True)
    ]
    return torch.cat(blocks, dim=-1).contiguous()


def padded_columns(parts: Sequence[int], tile: int = TILE) -> list[slice]:
    """Where each part's columns, padding included, lie in a padded matrix."""
    return [columns for _, columns in part_columns([-(-size // tile) * tile for size in parts])]


def tile_table(parts: Sequence[int], tile: int = TILE) -> Tensor:
    """int32 `[tiles, 4]`: `(part, first output column, end of the part's columns, 0)`."""
    entries = [
        (part, first, columns.stop, 0)
        for part, columns in part_columns(parts)
        for first in range(columns.start, columns.stop, tile)
    ]
    return torch.tensor(entries, dtype=torch.int32).reshape(-1, 4)


def count_tiles(parts: Sequence[int], tile: int = TILE) -> int:
    """Tiles of parts with these sizes."""
    return sum(-(-size // tile) for size in parts)
