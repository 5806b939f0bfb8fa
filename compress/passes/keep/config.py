"""Recipe stage `keep`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ....serving.scheme import LinearScheme
from ..base import StageConfig


class KeepConfig(StageConfig):
    """Keep the weights as they are: for a selection of inputs alone."""

    pass_: Literal["keep"] = Field(default="keep", alias="pass")

    @model_validator(mode="after")
    def _selects(self) -> KeepConfig:
        if self.selection is None:
            raise ValueError("keep leaves the weights alone, so the stage needs a selection")
        return self

    @property
    def structure(self) -> str:
        return "dense"

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        return LinearScheme(pattern="dense", density=1.0)
