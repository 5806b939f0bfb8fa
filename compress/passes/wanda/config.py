"""Recipe stage `wanda`."""

from typing import Literal

from pydantic import Field

from ..base import PruningConfig


class WandaConfig(PruningConfig):
    """Keep the largest |weight| times input norm. Fast: needs one number per input."""

    pass_: Literal["wanda"] = Field(default="wanda", alias="pass")
