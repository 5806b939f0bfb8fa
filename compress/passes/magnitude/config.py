"""Recipe stage `magnitude`."""

from typing import Literal

from pydantic import Field

from ..base import PruningConfig


class MagnitudeConfig(PruningConfig):
    """Keep the largest weights. The control that every other method has to beat."""

    pass_: Literal["magnitude"] = Field(default="magnitude", alias="pass")
