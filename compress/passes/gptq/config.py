"""Recipe stage `gptq`."""

from typing import Literal

from pydantic import Field

from ....serving.scheme import LinearScheme
from ..base import StageConfig, SweepSettings


class GPTQConfig(StageConfig, SweepSettings):
    """Round column by column, feed each error into the columns ahead, then improve all codes by coordinate descent."""

    pass_: Literal["gptq"] = Field(default="gptq", alias="pass")

    @property
    def structure(self) -> str:
        return self.numbers

    def weight_scheme(self, shape: tuple[int, int]) -> LinearScheme:
        return LinearScheme(pattern="dense", density=1.0, integers=self.integers())
