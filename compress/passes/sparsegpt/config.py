"""Recipe stage `sparsegpt`."""

from typing import Literal

from pydantic import Field, model_validator

from ..base import PruningConfig


class SparseGPTConfig(PruningConfig):
    """One sweep over column blocks: prune by optimal-brain-surgeon score, feed the error into the columns ahead.

    `block_size` columns are swept before their error reaches the rest in one matmul; `damping` is the fraction of the
    Hessian's mean diagonal added to its diagonal; `refine` conjugate-gradient steps towards the least squares on the
    mask follow.
    """

    pass_: Literal["sparsegpt"] = Field(default="sparsegpt", alias="pass")
    block_size: int = Field(default=128, ge=1)
    damping: float = Field(default=0.01, gt=0, lt=1)
    refine: int = Field(default=4, ge=0, le=1000)

    @model_validator(mode="after")
    def _whole_groups(self) -> "SparseGPTConfig":
        if self.nm is not None and self.block_size % self.nm[1]:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of the {self.nm[1]} of pattern {self.pattern}"
            )
        return self
