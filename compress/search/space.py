"""What a search may choose: points of the unit cube as budgets of the linears, all of which read the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ...serving.errors import InputError
from ...serving.scheme import LinearScheme
from ..allocation import LEVELS, divide
from ..passes import StageConfig
from ..passes.base import LinearBudget, SelectionSettings, Split
from .config import Search
from .strategies import Point

_SPARSITIES = (0.02, 0.95)  # beyond there is nothing to gain, or nothing left


class Budget(NamedTuple):
    """A linear's share of bytes that are not read, and the share of those read that goes to inputs."""

    sparsity: float
    channels: float


@dataclass(frozen=True)
class Member:
    """One linear of a search: its block, how its `weight` is stored (in `bits`), and the sparsities it may have."""

    block: int
    shape: tuple[int, int]
    settings: SelectionSettings
    weight: LinearScheme
    bits: int
    low: float
    high: float

    @property
    def start(self) -> Budget:
        return Budget(self.settings.sparsity, self.settings.channels)

    @property
    def greedy(self) -> bool:
        return self.settings.allocation == "greedy"

    def split(self, budget: Budget) -> Split:
        """The share of inputs and the rank that `budget` pays for."""
        return self.settings.model_copy(update=budget._asdict()).split(self.shape, self.weight)


class Space:
    """The budgets that a search of `settings` chooses from, for the linears of `stages` that select.

    A point of the cube holds, if they vary, an offset of the sparsity for each group of blocks and then one of the
    channels: 0.5 leaves them as they are. What does not fit the recipe's budget is moved up or down evenly.
    """

    def __init__(
        self, settings: Search, stages: Mapping[str, StageConfig], blocks: Sequence[Mapping[str, tuple[int, int]]]
    ) -> None:
        """`blocks` are the linears of each block with their shapes `(N, K)`; raises InputError when nothing varies."""
        self.settings = settings
        self.members: dict[str, Member] = {}
        for index, shapes in enumerate(blocks):
            for name, shape in shapes.items():
                selection = stages[name].selection if name in stages else None
                if selection is not None:
                    _require_searchable(name, selection)
                    self.members[name] = _member(index, shape, selection, stages[name])
        used = sorted({member.block for member in self.members.values()})
        count = min(settings.groups, len(used))
        edges = [round(i * len(used) / count) for i in range(count + 1)] if count else []
        self.groups = [used[start:stop] for start, stop in pairwise(edges)]
        branches = any(member.start.channels < 1 for member in self.members.values())
        sparsity, channels = "sparsity" in settings.vary and count > 1, "channels" in settings.vary and branches
        self.size = count * (sparsity + channels)
        if not self.size:
            raise InputError(
                "search: nothing varies; it needs a selection with a branch (channels below 1), or two groups of blocks"
                " whose sparsity varies"
            )
        self._sparsity_at = 0 if sparsity else None
        self._channels_at = count * sparsity if channels else None

    def budgets(self, point: Point, curves: Mapping[int, Mapping[str, Mapping[float, float]]]) -> dict[str, Budget]:
        """What each linear reads at `point`.

        Where a block's linears share their budget greedily it is divided by their error `curves` (block -> name ->
        sparsity -> error, see `allocation`).
        """
        group = {block: number for number, blocks in enumerate(self.groups) for block in blocks}

        def offset(first: int | None, member: Member) -> float:
            return 0.0 if first is None else 2 * point[first + group[member.block]] - 1

        wanted = {
            name: member.start.sparsity + self.settings.spread * offset(self._sparsity_at, member)
            for name, member in self.members.items()
        }
        sparsities = project(
            wanted,
            {name: (member.low, member.high) for name, member in self.members.items()},
            {name: member.bits for name, member in self.members.items()},
            sum(member.bits * member.start.sparsity for member in self.members.values()),
        )
        for block, found in curves.items():
            sharing = {name: self.members[name].bits for name in found}
            assert all(self.members[name].block == block and self.members[name].greedy for name in found)
            sparsities |= divide(found, sharing, sparsities)
        return {
            name: Budget(sparsities[name], self._channels(member, offset(self._channels_at, member)))
            for name, member in self.members.items()
        }

    def largest_rank(self, member: Member) -> int:
        """The rank of the largest branch that any point gives the linear."""
        if member.start.channels == 1 or self._channels_at is None:
            least = member.start.channels
        else:
            least = min(self.settings.least_channels, member.start.channels)
        return member.split(Budget(member.low, least)).rank

    def _channels(self, member: Member, offset: float) -> float:
        """The share of channels, whose rest grows with the square of where it lies: small branches matter most."""
        start = member.start.channels
        if start == 1 or offset == 0:
            return start
        most = 1 - min(self.settings.least_channels, start)
        place = ((1 - start) / most) ** 0.5 + offset
        return 1 - most * min(max(place, 0.0), 1.0) ** 2


def project(
    wanted: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    weights: Mapping[str, int],
    total: float,
) -> dict[str, float]:
    """The numbers within `bounds` whose sum, weighted by `weights`, is `total`, and that differ from `wanted` by one
    amount wherever the bounds allow it (the Euclidean projection, in the weights' metric)."""

    def moved(by: float) -> dict[str, float]:
        return {name: min(max(value + by, bounds[name][0]), bounds[name][1]) for name, value in wanted.items()}

    def excess(by: float) -> float:
        return sum(weights[name] * value for name, value in moved(by).items()) - total

    tolerance = 1e-12 * sum(weights.values())
    if abs(excess(0.0)) <= tolerance:
        return moved(0.0)
    low, high = -2.0, 2.0  # nothing is farther from its bounds: all at the lower ones, all at the upper ones
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return moved((low + high) / 2)


def profile_of(
    stage: StageConfig, matched: Sequence[str], budgets: Mapping[str, Budget], prefixes: Sequence[str]
) -> StageConfig:
    """`stage`, which works on the linears `matched`, with the `budgets` as its profile, ready to be written down.

    Blocks (their names are the `prefixes`) all of whose linears read alike get one entry.
    """
    assert stage.selection is not None  # or it would have no budgets
    profile: dict[str, LinearBudget] = {}
    for prefix in prefixes:
        inside = {name: budgets[name] for name in matched if name.startswith(f"{prefix}.")}
        if len(set(inside.values())) == 1:
            inside = {prefix: next(iter(inside.values()))}
        profile |= {name: LinearBudget(**budget._asdict()) for name, budget in inside.items()}
    selection = stage.selection.model_copy(update={"profile": profile, "allocation": "uniform"})
    return stage.model_copy(update={"selection": selection})


def _require_searchable(name: str, selection: SelectionSettings) -> None:
    """Raise InputError for selections that a trial does not measure as they will run."""
    for field, value in (("truncation", None), ("threshold", "fixed")):
        if getattr(selection, field) != value:
            raise InputError(f"search: {name}: selection.{field} is not searched; remove it, or the search")
    if selection.score == "gradient":
        raise InputError(f"search: {name}: selection.score: gradient is not searched; use l2, or remove the search")


def _member(block: int, shape: tuple[int, int], selection: SelectionSettings, stage: StageConfig) -> Member:
    weight = stage.weight_scheme(shape)
    bits, beside = selection.bits(shape, weight)
    low, high = _SPARSITIES
    high = min(high, 1 - 1.5 * beside / bits)  # threshold and norms are read, and some inputs should be
    if selection.allocation == "greedy":  # error curves have these ends
        low, high = min(LEVELS), max((level for level in LEVELS if level <= high), default=low)
    start = selection.sparsity
    return Member(block, shape, selection, weight, bits, min(low, start), max(high, start))
