"""What every pass looks like: a config that is a recipe stage, and a pure solver."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from ...serving.scheme import LinearScheme, Pattern, parse_nm
from ..statistics import InputStatistics


class StageConfig(BaseModel):
    """One stage of a recipe: a pass's name, which linears it applies to, and (in subclasses) its settings.

    `targets` and `ignore` are patterns over full module names such as `model.layers.0.mlp.down_proj`: globs, or regular
    expressions after `re:`. A glob without a dot matches the last part of the name, so `down_proj` is enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

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
    def name(self) -> str:
        """Registered name of the pass."""
        return str(getattr(self, "pass_"))  # noqa: B009 - the field is declared by each pass, as a literal

    def scheme(self) -> LinearScheme:
        """What the stage leaves behind in each linear it applies to."""
        raise NotImplementedError


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
        if self.pattern == "unstructured" and self.density is None:
            raise ValueError("pattern unstructured needs a density, such as 0.5")
        if self.pattern != "unstructured" and (self.density is not None or self.scope != "row"):
            raise ValueError(f"pattern {self.pattern} fixes density and scope; remove them")
        return self

    @property
    def nm(self) -> tuple[int, int] | None:
        """`(N, M)`, or None for unstructured."""
        return parse_nm(self.pattern)

    @property
    def kept(self) -> float:
        """Kept fraction of the weights."""
        if self.nm is not None:
            return self.nm[0] / self.nm[1]
        assert self.density is not None
        return self.density

    def scheme(self) -> LinearScheme:
        return LinearScheme(pattern=self.pattern, density=self.kept)


@dataclass(frozen=True)
class PruneResult:
    """`weight` `[N, K]` fp32, exactly zero off `mask` `[N, K]` (bool, True is kept); `stats` for the report."""

    weight: Tensor
    mask: Tensor
    stats: dict[str, float] = field(default_factory=dict)


ConfigT = TypeVar("ConfigT", bound=PruningConfig)
Needs = Literal["nothing", "norms", "hessian"]


@dataclass(frozen=True)
class Pass(Generic[ConfigT]):
    """A registered pass: its config class, what it needs to know about a linear's inputs, and its solver.

    `solve(weight [N, K] fp32, statistics, config) -> PruneResult` is pure: it changes none of its arguments.
    """

    config: type[ConfigT]
    needs: Needs
    solve: Callable[[Tensor, InputStatistics, Any], PruneResult]
    summary: str
