"""Recipe stage `rtn`."""

from typing import Literal

from pydantic import Field

from ....serving.scheme import LinearScheme
from ..base import StageConfig, WeightIntegers


class RTNConfig(StageConfig, WeightIntegers):
    """Round each weight to the nearest point of its group's grid. Needs no data."""

    pass_: Literal["rtn"] = Field(default="rtn", alias="pass")

    @property
    def structure(self) -> str:
        return self.numbers

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        return LinearScheme(pattern="dense", density=1.0, integers=self.integers())
