"""Recipe stage `gqsa`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ....serving.scheme import LinearScheme, parse_group, parse_nm, parse_output_group
from ....triton_kernels.formats.groups import choose_segments
from ..admm.config import ADMMSettings
from ..base import StageConfig, SweepSettings

# Linears whose input tensor parallelism splits; their rows are balanced piece by piece.
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "dense_4h_to_h", "fc2")


def _packable(value: str) -> str:
    if parse_nm(value) is None and _group_of(value) is None:
        raise ValueError(f"unknown pattern {value!r}; use 1xG such as 1x16, Gx1 such as 16x1, or N:M such as 2:4")
    return value


def _group_of(pattern: str) -> int | None:
    return parse_group(pattern) or parse_output_group(pattern)


class GQSAConfig(ADMMSettings, SweepSettings):
    """Prune and quantize in one sweep: groups of inputs of a row (`1xG` with a kept `density`), of outputs of an input
    (`Gx1`), or `N:M`.

    `mask` says how the kept weights are found: `admm` (also solves for the weights, with ADMM's settings), or while the
    sweep goes, by what removing a whole group costs (`obs`), the sum of what its weights cost one by one (`diagonal`),
    or the sum of its squared weights times input norms (`wanda`). Groups are balanced over each row (`Gx1`: over
    each input), or over the whole layer (`balance`); in `segments` of a row alike, so that tensor parallelism can cut
    there (`auto`: as many of 8, 4, 2, 1 as fit where it cuts rows). With `allocation: fisher` the rows of some linears
    keep more groups than those of others, so that the model's predictions suffer least (`fisher.py`), and all linears
    together as many as their `density` says.
    """

    pass_: Literal["gqsa"] = Field(default="gqsa", alias="pass")
    pattern: Annotated[str, AfterValidator(_packable)] = "1x16"
    damping: float = Field(default=0.03, gt=0, lt=1)
    mask: Literal["admm", "obs", "diagonal", "wanda"] = "admm"
    balance: Literal["row", "layer"] = "row"
    segments: Literal["auto", 1, 2, 4, 8] = "auto"
    allocation: Literal["uniform", "fisher"] = "uniform"

    @model_validator(mode="before")
    @classmethod
    def _integers_follow_the_pattern(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(pattern := data.get("pattern", "1x16"), str):
            implied = {"group_size": _group_of(pattern), "along": parse_output_group(pattern) and "outputs"}
            return {name: value for name, value in implied.items() if value is not None} | data
        return data

    @model_validator(mode="after")
    def _storable(self) -> GQSAConfig:
        if self.scope != "row":
            raise ValueError("use balance instead of scope")
        if (self.along == "outputs") != self.by_outputs:
            raise ValueError(f"pattern {self.pattern} fixes along; remove it")
        if self.group is None:
            if self.balance != "row" or self.segments != "auto":
                raise ValueError(f"pattern {self.pattern} has no balance and no segments; remove them")
            for name in ("group_size", "block_size"):
                if self.nm is not None and getattr(self, name) % self.nm[1]:
                    raise ValueError(f"{name} is not a multiple of the {self.nm[1]} of pattern {self.pattern}")
        elif self.group_size != self.group:
            raise ValueError(f"pattern {self.pattern} fixes group_size; remove it")
        elif self.bits == 8:
            raise ValueError(f"pattern {self.pattern} is stored in 4 bits")
        elif self.by_outputs and (self.balance == "layer" or self.segments not in ("auto", 1)):
            raise ValueError(f"pattern {self.pattern} has neither balance: layer nor segments")
        elif not self.by_outputs and self.block_size < self.group:
            raise ValueError(f"block_size {self.block_size} is smaller than a group of pattern {self.pattern}")
        elif self.balance == "layer" and self.segments not in ("auto", 1):
            raise ValueError("balance: layer has no segments")
        if self.allocation == "fisher" and (self.group is None or self.by_outputs or self.balance == "layer"):
            raise ValueError("allocation: fisher gives rows of groups other densities; use a pattern 1xG, balance: row")
        return self

    @property
    def group(self) -> int | None:
        """G of pattern 1xG or Gx1, or None for N:M."""
        return _group_of(self.pattern)

    @property
    def by_outputs(self) -> bool:
        """Whether groups lie along the outputs."""
        return parse_output_group(self.pattern) is not None

    @property
    def structure(self) -> str:
        share = "" if self.group is None else f" {100 * self.kept:g}%{' by layer' if self.balance == 'layer' else ''}"
        return f"{self.pattern}{share} {self.numbers}"

    @property
    def shares_by_fisher(self) -> bool:
        return self.allocation == "fisher" or super().shares_by_fisher

    @property
    def sparsity(self) -> float:
        return super().sparsity if self.allocation == "uniform" else 1 - self.kept

    def with_sparsity(self, sparsity: float) -> StageConfig:
        if self.allocation == "uniform":
            return super().with_sparsity(sparsity)
        return self.model_copy(update={"density": 1 - sparsity})

    def nearest_sparsity(self, sparsity: float, shape: tuple[int, int]) -> float:
        if self.allocation == "uniform":
            return super().nearest_sparsity(sparsity, shape)
        assert self.segments != "auto"  # for_linear has been there
        each = self._groups(shape) // self.segments
        return 1 - max(1, min(round((1 - sparsity) * each), each - 1)) / each  # neither none nor all of a segment

    def kept_groups(self, shape: tuple[int, int]) -> int:
        """How many groups a linear of `shape` `(N, K)` keeps: in each row (Gx1: of each input), or by layer in all."""
        return round(self.kept * self._groups(shape) * (shape[0] if self.balance == "layer" else 1))

    def _groups(self, shape: tuple[int, int]) -> int:
        """Groups in a row, or along the outputs of an input."""
        return -(-shape[0 if self.by_outputs else 1] // self.group_size)

    def for_linear(self, name: str, shape: tuple[int, int]) -> GQSAConfig:
        """Fills in `segments`; raises ValueError when the density keeps no group, or the segments do not fit."""
        if self.group is None:
            return self
        kept = self.kept_groups(shape)
        if kept == 0:
            unit = "input" if self.by_outputs else "row"
            raise ValueError(f"density {self.kept:g} keeps none of its {self._groups(shape)} groups per {unit}")
        segments: int | str = self.segments
        if segments == "auto":
            row_parallel = name.rpartition(".")[2] in ROW_PARALLEL and self.balance == "row"
            segments = choose_segments(shape[1], self.group, kept) if row_parallel and not self.by_outputs else 1
        elif kept % int(segments) or shape[1] % (self.group * int(segments)):
            raise ValueError(f"{segments} segments do not split its {shape[1]} inputs and {kept} kept groups evenly")
        return self.model_copy(update={"segments": segments})

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        integers = self.integers()
        if self.group is None:
            return LinearScheme(pattern=self.pattern, density=self.kept, integers=integers)
        assert self.segments != "auto"  # for_linear has been there
        kept, total = self.kept_groups(shape), self._groups(shape)
        return LinearScheme(
            pattern=self.pattern,
            density=kept / (total * shape[0] if self.balance == "layer" else total),
            integers=integers,
            kept=kept,
            segments=self.segments,
            balance=self.balance,
        )
