"""What every pass looks like: a config that is a recipe stage, and a pure solver."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from ...serving.scheme import MOST, IntegerScheme, LinearScheme, LowRankScheme, Pattern, SelectionScheme, parse_nm
from ...serving.storage import stored_bits
from ...triton_kernels.formats.integers import Quantized
from ..statistics import InputStatistics


class LowRankSettings(BaseModel):
    """A branch that makes up for what a pass does to a linear `[N, K]`: its rank is `fraction` of the smaller of N and
    K, in multiples of 16. It is stored in the checkpoint's dtype, or in `bits` with a scale per `group_size` numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.1, gt=0, le=1)
    bits: Literal[4, 8] | None = None
    group_size: int = Field(default=64, ge=2, le=MOST, multiple_of=2)

    def scheme(self, shape: tuple[int, int]) -> LowRankScheme:
        """The branch beside a linear of `shape` `(N, K)`."""
        rank = min(min(shape), max(16, 16 * round(self.fraction * min(shape) / 16)))
        if self.bits is None:
            return LowRankScheme(rank=rank)
        integers = IntegerScheme(bits=self.bits, group_size=self.group_size, symmetric=True)
        return LowRankScheme(rank=rank, integers=integers)


class Split(NamedTuple):
    """How the bytes that a token reads of a linear are spent: the share of `inputs` read, and the branch's `rank`."""

    inputs: float
    rank: int


class LinearBudget(BaseModel):
    """What one linear reads, where that is not what its stage says; see `SelectionSettings`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(gt=0, lt=1)
    channels: float | None = Field(default=None, ge=0, le=1)


class SelectionSettings(BaseModel):
    """Every token reads the inputs of a linear with the largest scores, so that it does not read the share `sparsity`
    of the weight's bytes; thresholds, norms and branch count as read.

    `score`: `size` (|x|), or times the norm of the input's weights, `l2` or `l1`, or times how much the input moves the
    block's output, by `gradient` (`sensitivity.py`). `threshold: fixed` is one per linear, so that tokens differ in how
    much they read; with `topk` all read equally many inputs; with `prompt` all tokens after a prompt read those that it
    chooses, and the prompt reads everything. `truncation`, in place of `sparsity` and with `l2`, is the relative error
    that leaving inputs out may cause in a linear's output (CETT); what is read follows from it.

    `channels` is the share of the bytes read that goes to inputs; the rest goes to a low-rank branch for the inputs
    that are not read, the truncated SVD of the `weight` or fitted to the unread `inputs` of the calibration. With
    `allocation: greedy` the linears of a block share its budget so that its outputs suffer least, and with `fisher`
    those of all blocks so that the model's predictions do (`fisher.py`); `uniform` gives all the same sparsity.
    `profile` has other sparsities and channels for linears, or for all linears of a module such as `model.layers.3`; it
    is what a search leaves behind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(default=0, ge=0, lt=1)
    truncation: float | None = Field(default=None, gt=0, lt=1)
    score: Literal["size", "l2", "l1", "gradient"] = "size"
    threshold: Literal["fixed", "topk", "prompt"] = "fixed"
    channels: float = Field(default=1.0, ge=0, le=1)
    branch: Literal["weight", "inputs"] = "inputs"
    allocation: Literal["uniform", "greedy", "fisher"] = "uniform"
    profile: dict[str, LinearBudget] = Field(default_factory=dict)

    def for_linear(self, name: str) -> SelectionSettings:
        """These settings with what the profile says about linear `name`: its own entry, or the innermost module's."""
        if not self.profile:
            return self
        within = [key for key in self.profile if name == key or name.startswith(f"{key}.")]
        changes: dict[str, Any] = {"profile": {}}
        if within:
            changes |= self.profile[max(within, key=len)].model_dump(exclude_none=True)
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _compatible(self) -> SelectionSettings:
        if (self.sparsity > 0) == (self.truncation is not None):
            raise ValueError("give sparsity, above 0, or truncation in its place")
        if self.truncation is not None:
            if self.score != "l2":
                raise ValueError(
                    f"truncation is of outputs of size |x| * l2 norm, not score: {self.score}; set it to l2"
                )
            if self.threshold != "fixed":
                raise ValueError(f"truncation finds one threshold per linear, not threshold: {self.threshold}")
            if self.channels < 1 or self.allocation != "uniform":
                raise ValueError("truncation leaves no bytes to share; remove channels and allocation")
        if self.score == "gradient" and self.allocation != "uniform":
            raise ValueError(
                f"allocation: {self.allocation} does not collect the gradients of score: gradient; choose another"
            )
        return self

    @property
    def fits(self) -> bool:
        """Whether a branch is fitted to the inputs, which takes a Hessian."""
        return self.channels < 1 and self.branch == "inputs"

    def scheme(self, weight: LinearScheme, shape: tuple[int, int]) -> LinearScheme:
        """`weight`, the scheme of a linear of `shape` `(N, K)`, with the selection; ValueError if impossible."""
        selecting = self._beside(weight, None)
        rank = self.split(shape, selecting).rank
        return self._beside(weight, LowRankScheme(rank=rank)) if rank else selecting

    def split(self, shape: tuple[int, int], scheme: LinearScheme) -> Split:
        """Inputs and rank for a linear of `shape` `(N, K)`: the nearest whole rank, and inputs for what that leaves.

        With a truncation the inputs are all there are. Raises ValueError when norms and threshold alone are more than
        may be read.
        """
        total, beside = self.bits(shape, scheme)
        spent = (1 - self.sparsity) * total
        if spent < beside:
            raise ValueError(f"sparsity {self.sparsity:g} leaves no bytes for inputs beside their norms; lower it")
        rank_bits = 16 * sum(shape)
        rank = min(round((1 - self.channels) * spent / rank_bits), int((spent - beside) / rank_bits))
        return Split((spent - beside - rank * rank_bits) / total, rank)

    def bits(self, shape: tuple[int, int], scheme: LinearScheme) -> tuple[int, int]:
        """Bits of the weight of a linear of `shape` `(N, K)`, of which `1 - sparsity` are read, and of what is always
        read of it: threshold and norms."""
        beside = 32 + 32 * shape[1] * (self.score != "size")
        plain = self._beside(scheme, None)
        return stored_bits(plain, shape, torch.bfloat16) - beside, beside

    def _beside(self, weight: LinearScheme, branch: LowRankScheme | None) -> LinearScheme:
        selection = SelectionScheme(norms=self.score != "size", threshold=self.threshold)
        try:
            return LinearScheme(**{**dict(weight), "selection": selection, "low_rank": branch})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


class StageConfig(BaseModel):
    """One stage of a recipe: a pass's name, which linears it applies to, and (in subclasses) its settings.

    `targets` and `ignore` are patterns over full module names such as `model.layers.0.mlp.down_proj`: globs, or regular
    expressions after `re:`. A glob without a dot matches the last part of the name, so `down_proj` is enough.
    `low_rank` adds a branch to each of them; `selection` lets each token choose the inputs it reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    low_rank: LowRankSettings | None = None
    selection: SelectionSettings | None = None

    @model_validator(mode="after")
    def _one_branch(self) -> StageConfig:
        if self.low_rank is not None and self.selection is not None:
            raise ValueError("low_rank: beside a selection, selection.channels says what goes to the branch; remove it")
        return self

    @field_validator("targets", "ignore")
    @classmethod
    def _valid_expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is not a valid regular expression ({error})") from None
        return value

    @property
    def needs_gradients(self) -> bool:
        """Whether its linears choose their inputs by gradients."""
        return self.selection is not None and self.selection.score == "gradient"

    @property
    def shares_by_fisher(self) -> bool:
        """Whether its linears share the bytes they read, or the weights they keep, with all others that do."""
        return self.selection is not None and self.selection.allocation == "fisher"

    @property
    def sparsity(self) -> float:
        """The share that a linear does not read of its bytes, or keep of its weights, where it may differ by linear."""
        assert self.selection is not None  # only such stages allocate, and those that override this
        return self.selection.sparsity

    def with_sparsity(self, sparsity: float) -> StageConfig:
        """The stage with another `sparsity`."""
        assert self.selection is not None
        return self.model_copy(update={"selection": self.selection.model_copy(update={"sparsity": sparsity})})

    def nearest_sparsity(self, sparsity: float, shape: tuple[int, int]) -> float:
        """What a linear of `shape` `(N, K)` can have that is next to `sparsity`."""
        return sparsity

    @property
    def name(self) -> str:
        """Registered name of the pass."""
        return str(getattr(self, "pass_"))  # noqa: B009 - the field is declared by each pass, as a literal

    @property
    def structure(self) -> str:
        """Pattern of the weights it leaves, for tables."""
        raise NotImplementedError

    def for_linear(self, name: str, shape: tuple[int, int]) -> StageConfig:
        """The stage with what depends on one linear `name` of `shape` `(N, K)` filled in; ValueError if impossible."""
        return self

    def scheme(self, shape: tuple[int, int]) -> LinearScheme:
        """What the stage leaves behind in a linear of `shape` `(N, K)`; its config comes from `for_linear`.

        Raises ValueError for a branch beside weights that are stored whole, or a selection beside groups of inputs.
        """
        scheme = self.weight_scheme(shape)
        if self.selection is not None:
            return self.selection.scheme(scheme, shape)
        if self.low_rank is None:
            return scheme
        if scheme.storage == "dense":
            raise ValueError(f"pattern {scheme.pattern} is stored whole, where a low-rank branch would gain nothing")
        return scheme.model_copy(update={"low_rank": self.low_rank.scheme(shape)})

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        """The scheme without a selection or a low-rank branch."""
        raise NotImplementedError


class IntegerSettings(BaseModel):
    """Settings every quantizing pass shares.

    Weights get `bits` each (3 and 2 are for study: they are stored in 4), with one fp16 scale, and unless `symmetric`
    one integer zero point, per group of `group_size` inputs of a row. `candidates` ranges per group are tried, weighed
    by what the pass knows about the inputs; 1 takes the group's extremes.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(default=64, ge=2, le=MOST, multiple_of=2)
    symmetric: bool = False
    candidates: int = Field(default=20, ge=1, le=1000)

    @property
    def numbers(self) -> str:
        """The numbers in words, for tables: `int4 g64`."""
        return f"int{self.bits} g{self.group_size}{' sym' if self.symmetric else ''}"

    def integers(self) -> IntegerScheme:
        """How the codes are stored."""
        return IntegerScheme(bits=8 if self.bits == 8 else 4, group_size=self.group_size, symmetric=self.symmetric)


class WeightIntegers(IntegerSettings):
    """Integers of a linear's weight: groups of inputs of a row, or `along` the `outputs` of an input, so that an input
    that is not selected need not be read."""

    along: Literal["inputs", "outputs"] = "inputs"

    @property
    def numbers(self) -> str:
        return f"{super().numbers}{' along outputs' if self.along == 'outputs' else ''}"

    def integers(self) -> IntegerScheme:
        return super().integers().model_copy(update={"along": self.along})


class SweepSettings(WeightIntegers):
    """Settings of the passes that feed rounding errors forward.

    The sweep visits columns in blocks of `block_size`, the largest activations first with `activation_order` (whole
    groups, then inside a group); `damping` is the fraction of the Hessian's mean diagonal added to its diagonal;
    `descents` rounds of coordinate descent follow.
    """

    block_size: int = Field(default=128, ge=1)
    activation_order: bool = True
    damping: float = Field(default=0.03, gt=0, lt=1)
    descents: int = Field(default=3, ge=0, le=1000)


class PruningConfig(StageConfig):
    """Settings every pruning pass shares.

    `pattern` is `N:M` (keep N of every M consecutive inputs of a row) or `unstructured` with a kept `density`, counted
    over each row or over the whole layer (`scope`). For N:M the density is N/M and must not be given.
    """

    pattern: Pattern = "2:4"
    density: float | None = Field(default=None, gt=0, lt=1)
    scope: Literal["row", "layer"] = "row"

    @model_validator(mode="after")
    def _density_fits(self) -> PruningConfig:
        if self.nm is None and self.density is None:
            raise ValueError(f"pattern {self.pattern} needs a density, such as 0.5")
        if self.nm is not None and (self.density is not None or self.scope != "row"):
            raise ValueError(f"pattern {self.pattern} fixes density and scope; remove them")
        return self

    @property
    def nm(self) -> tuple[int, int] | None:
        """`(N, M)`, or None for other patterns."""
        return parse_nm(self.pattern)

    @property
    def kept(self) -> float:
        """Kept fraction of the weights."""
        if self.nm is not None:
            return self.nm[0] / self.nm[1]
        assert self.density is not None
        return self.density

    @property
    def structure(self) -> str:
        return self.pattern

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        return LinearScheme(pattern=self.pattern, density=self.kept)


class Branch(NamedTuple):
    """`v` `[K, rank]` and `u` `[N, rank]`, fp32, exactly as they are stored; `quantized`: the codes of v^T and u."""

    v: Tensor
    u: Tensor
    quantized: tuple[Quantized, Quantized] | None


@dataclass(frozen=True)
class PruneResult:
    """What a solver leaves.

    `weight` `[N, K]` fp32, exactly zero off `mask` `[N, K]` (bool, True is kept); `stats` for the report. With
    `quantized`, `weight` is exactly what its codes, scales and zeros stand for, those of W^T where groups lie along the
    outputs; `branch` stands beside it.
    """

    weight: Tensor
    mask: Tensor
    stats: dict[str, float] = field(default_factory=dict)
    quantized: Quantized | None = None
    branch: Branch | None = None


ConfigT = TypeVar("ConfigT", bound=StageConfig)
Needs = Literal["nothing", "norms", "hessian"]


@dataclass(frozen=True)
class Pass(Generic[ConfigT]):
    """A registered pass: its config class, what it needs to know about a linear's inputs, and its solver.

    `solve(weight [N, K] fp32, statistics, config) -> PruneResult` is pure: it changes none of its arguments. `arrays`
    is how many fp32 arrays like the weight, and like the Hessian `[K, K]`, exist at its peak, its arguments among them
    (measured; `plan` reads it).
    """

    config: type[ConfigT]
    needs: Needs
    solve: Callable[[Tensor, InputStatistics, Any], PruneResult]
    arrays: tuple[int, int]
    summary: str
