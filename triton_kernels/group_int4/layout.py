"""GPU order of kept int4 groups (GQSA), made once after load.

Rows go in tiles of 16. A *set* is one kept group of each of the 16 rows: the j-th of every row. With `g` 0..7, `t`
0..3 and a lane `4g + t`, a lane holds columns of two groups per set: those of rows g and g + 8. Sets come in units of
4 (8 when groups have 8 columns); a row with fewer kept groups gets groups of scale 0.

- `codes[..., units * blocks, 128]` int32, word `4 * lane + i` of a block of 512 bytes: one 16-byte load per lane.
  Nibble `4h + 2c + half` of a word belongs to row `g + 8 half`. Set of the block and column in its group, by group
  size: 8: `2i + c`, `2t + h`; 16: `i`, `4t + 2c + h`; 32: `i // 2`, `8t + 4 (i % 2) + 2c + h`;
  64: 0, `32 (i // 2) + 8t + 4 (i % 2) + 2c + h`. These are A fragments of `mma.m16n8k16`.
- `scales[..., quads, 8, 4]` int32: for `g` and four sets, the fp16 bits of row g low, of row g + 8 high.
- `index[..., quads, 8, 4]` int32: zero points of row g (bits 0-3) and g + 8 (4-7), and the numbers of their groups in
  the whole row, 12 bits each (8-19, 20-31).

Balanced by row, the axis before `units` and `quads` is `tiles`, and all tiles have equally many. Balanced over the
layer, there is one axis of all units, and three int32 tables say who owns them: `order[tiles * 16]` is the row of
each place in a tile (-1: none), `unit_start[tiles + 1]` where a tile's units begin, `worker_start[workers + 1]` where
a worker's tiles begin. Rows are sorted by their count before they are cut into tiles, so that little is padded, and
tiles are given to workers by longest processing time first: no atomics, no fix-up, and workers differ by a few percent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import FormatError, groups, groups_layer
from ..formats.bits import from_bits, to_bits
from ..formats.groups import Groups, KeptGroups
from ..formats.groups_layer import LayerGroups
from ..int4.layout import move
from .schedule import Schedule, schedule

ROWS = 16
LARGEST_NUMBER = 4095
UNIT_SETS = {8: 8, 16: 4, 32: 4, 64: 4}


class Prepared(NamedTuple):
    """Groups in GPU order (see the module's docstring).

    `row_start` is the file's, kept to get back to it; `group`: columns of a group; `rows`, `columns`: N and K;
    `kept`: groups of a row, or of the whole matrix when it is balanced over the layer.
    """

    codes: Tensor
    scales: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    order: Tensor | None
    unit_start: Tensor | None
    worker_start: Tensor | None
    row_start: Tensor | None
    group: int
    rows: int
    columns: int
    kept: int

    def expert(self, index: int) -> Prepared:
        """The weight of one expert, sharing memory."""
        return self._replace(codes=self.codes[index], scales=self.scales[index], index=self.index[index])


def prepared_shapes(shape: tuple[int, ...], *, group_size: int, kept: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a `Prepared` weight `[..., N, K]`, balanced by row with `kept` groups in each."""
    *lead, rows, _ = shape
    tiles, units = -(-rows // ROWS), count_units(kept, group_size)
    quads = (*lead, tiles, units * UNIT_SETS[group_size] // 4, 8, 4)
    return {"codes": (*lead, tiles, units * unit_blocks(group_size), 128), "scales": quads, "index": quads}


def count_units(kept: int, group_size: int) -> int:
    """Units that hold `kept` sets."""
    return -(-kept // UNIT_SETS[group_size])


def unit_blocks(group_size: int) -> int:
    """Blocks of 512 bytes in a unit."""
    return UNIT_SETS[group_size] * group_size // 64


def check_width(columns: int, group_size: int) -> None:
    """Raise FormatError when a row has more groups than the GPU order can number."""
    if -(-columns // group_size) > LARGEST_NUMBER + 1:
        raise FormatError(f"GPU kernels number {LARGEST_NUMBER + 1} groups of a row, too few for K = {columns}")


def prepare(packed: Groups, columns: int, *, segments: int = 1) -> Prepared:
    """GPU order of validated groups `[..., N, K]` balanced by row, K = `columns`; FormatError when K is too large."""
    kept = groups.unpack(packed, columns, segments=segments)
    rows, count, group = kept.codes.shape[-3:]
    check_width(columns, group)
    missing = count_units(count, group) * UNIT_SETS[group] - count
    return Prepared(*_order(_pad(kept, -rows % ROWS, missing)), None, None, None, None, group, rows, columns, count)


def restore(prepared: Prepared, *, segments: int = 1) -> Groups:
    """Inverse of `prepare`."""
    codes, scales, zeros, numbers = _disorder(prepared.codes, prepared.scales, prepared.index, prepared.group)
    assert zeros is not None
    rows, kept = prepared.rows, prepared.kept
    scales, zeros, numbers = (part[..., :rows, :kept].contiguous() for part in (scales, zeros, numbers))
    entries = KeptGroups(codes[..., :rows, :kept, :].contiguous(), scales, zeros, numbers)
    return groups.pack(entries, prepared.columns, segments=segments)


def prepare_layer(packed: LayerGroups, columns: int) -> Prepared:
    """GPU order of validated groups `[N, K]` balanced over the layer; FormatError when K = `columns` is too large."""
    entries, row_start = groups_layer.unpack(packed)
    total, group = entries.codes.shape
    check_width(columns, group)
    plan, chosen = _places(row_start, group)
    padded = _pad(KeptGroups(*(None if t is None else t[None] for t in entries)), 0, 1)  # type: ignore[arg-type]
    picked = KeptGroups(*(None if t is None else t[0][chosen.to(t.device)] for t in padded))  # type: ignore[arg-type]
    codes, scales, index = (tensor[0] for tensor in _order(picked))
    order, unit_start, worker_start = (table.to(codes.device) for table in plan)
    return Prepared(
        codes, scales, index, order, unit_start, worker_start, row_start, group, len(row_start) - 1, columns, total
    )


def restore_layer(prepared: Prepared) -> LayerGroups:
    """Inverse of `prepare_layer`."""
    assert prepared.row_start is not None
    _, chosen = _places(prepared.row_start, prepared.group)
    real = (chosen < prepared.kept).to(prepared.codes.device)
    place = chosen.to(real.device)[real]
    picked = _disorder(prepared.codes[None], prepared.scales[None], prepared.index[None], prepared.group)
    entries = [part.new_empty((prepared.kept, *part.shape[2:])) for part in picked if part is not None]
    for entry, part in zip(entries, picked, strict=True):
        assert part is not None
        entry[place] = part[real]
    return groups_layer.pack(KeptGroups(*entries), prepared.row_start, prepared.columns)


def _places(row_start: Tensor, group: int) -> tuple[Schedule, Tensor]:
    """The schedule, and int64 `[16, sets]`: the entry at each place, or their count where there is none."""
    starts = row_start.cpu().long()
    counts, total = starts.diff(), int(starts[-1])
    plan = schedule(counts, UNIT_SETS[group])
    units = plan.unit_start.long().diff()
    tile = torch.arange(len(units)).repeat_interleave(units * UNIT_SETS[group])
    within = torch.arange(len(tile)) - (plan.unit_start.long()[:-1] * UNIT_SETS[group])[tile]
    row = plan.order.long().view(-1, ROWS)[tile].T
    real = (row >= 0) & (within < counts[row.clamp_min(0)])
    return plan, torch.where(real, starts[row.clamp_min(0)] + within, total)


# How the set within a block, the column within a group and the word of a lane split into axes, outermost first.
_SIZES = {"i": 4, "t": 4, "c": 2, "h": 2, "q": 2, "p": 2, "s": 2}
_SET = {8: "ic", 16: "i", 32: "s", 64: ""}
_COLUMN = {8: "th", 16: "tch", 32: "tqch", 64: "ptqch"}
_WORD = {8: "i", 16: "i", 32: "sq", 64: "pq"}


def _axes(letters: str) -> list[int]:
    return [_SIZES[letter] for letter in letters]


def _order(kept: KeptGroups) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes, scales, index)` of entries `[..., 16 * tiles, sets]`."""
    assert kept.zeros is not None
    *lead, rows, sets, group = kept.codes.shape
    blocks = sets * group // 64
    letters = _SET[group] + _COLUMN[group]
    split = kept.codes.reshape(*lead, rows // ROWS, 2, 8, blocks, *_axes(letters))
    nibbles = move(split, "THgB" + letters, "TBgt" + _WORD[group] + "hcH")
    bytes_ = nibbles[..., 0] | nibbles[..., 1] << 4
    codes = bytes_.reshape(*lead, rows // ROWS, blocks, 512).view(torch.int32)
    scales, zeros, numbers = (
        _pairs(to_bits(kept.scales).long() & 0xFFFF),
        _pairs(kept.zeros.long()),
        _pairs(kept.numbers),
    )
    index = zeros[..., 0] | zeros[..., 1] << 4 | numbers[..., 0] << 8 | numbers[..., 1] << 20
    return codes, (scales[..., 0] | scales[..., 1] << 16).to(torch.int32), index.to(torch.int32)


def _disorder(codes: Tensor, scales: Tensor, index: Tensor, group: int) -> KeptGroups:
    """Inverse of `_order`."""
    *lead, tiles, blocks, _ = codes.shape
    letters = _SET[group] + _COLUMN[group]
    bytes_ = codes.contiguous().view(torch.uint8).reshape(*lead, tiles, blocks, 8, 4, *_axes(_WORD[group]), 2, 2)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1)
    split = move(nibbles, "TBgt" + _WORD[group] + "hcH", "THgB" + letters)
    dense = split.reshape(*lead, tiles * ROWS, 4 * index.shape[-3], group)
    words = index.long() & 0xFFFFFFFF
    zeros = torch.stack((words & 15, words >> 4 & 15), -1).to(torch.uint8)
    numbers = torch.stack((words >> 8 & LARGEST_NUMBER, words >> 20), -1)
    patterns = torch.stack((scales, scales >> 16), -1).to(torch.int16)
    return KeptGroups(dense, from_bits(_unpaired(patterns)), _unpaired(zeros), _unpaired(numbers))


def _pairs(entries: Tensor) -> Tensor:
    """`[..., 16 * tiles, sets]` -> contiguous `[..., tiles, quads, g, j, half]`."""
    return move(
        entries.reshape(*entries.shape[:-2], entries.shape[-2] // ROWS, 2, 8, entries.shape[-1] // 4, 4),
        "THgQj",
        "TQgjH",
    ).contiguous()


def _unpaired(pairs: Tensor) -> Tensor:
    """Inverse of `_pairs`."""
    *lead, tiles, quads, _, _, _ = pairs.shape
    return move(pairs, "TQgjH", "THgQj").reshape(*lead, tiles * ROWS, quads * 4)


def _pad(kept: KeptGroups, rows: int, sets: int) -> KeptGroups:
    """Append rows and sets of scale 0 to entries `[..., rows, sets]`."""
    assert kept.zeros is not None
    padding = (0, sets, 0, rows)
    return KeptGroups(
        F.pad(kept.codes, (0, 0, *padding), value=groups.MIDDLE),
        F.pad(kept.scales, padding),
        F.pad(kept.zeros, padding, value=groups.MIDDLE),
        F.pad(kept.numbers, padding),
    )
