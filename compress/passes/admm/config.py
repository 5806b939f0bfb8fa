"""Recipe stage `admm`."""

from typing import Literal

from pydantic import Field, model_validator

from ..base import PruningConfig


class ADMMSettings(PruningConfig):
    """How to alternate between the least-squares weights and the pattern, whose density falls along a cubic schedule.

    `iterations` in all, the mask tightening over the first `ramp` of them; `penalty` is ADMM's rho on the normalised
    Hessian; `refine` conjugate-gradient steps then solve the least squares exactly on the final mask; `damping` as in
    SparseGPT.
    """

    iterations: int = Field(default=20, ge=1, le=1000)
    ramp: int = Field(default=15, ge=1)
    penalty: float = Field(default=1.0, gt=0)
    refine: int = Field(default=10, ge=0, le=1000)
    damping: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _ramp_fits(self) -> "ADMMSettings":
        if self.ramp > self.iterations:
            raise ValueError(f"ramp {self.ramp} is longer than the {self.iterations} iterations")
        return self


class ADMMConfig(ADMMSettings):
    """Least squares under a gradually tightening mask."""

    pass_: Literal["admm"] = Field(default="admm", alias="pass")
