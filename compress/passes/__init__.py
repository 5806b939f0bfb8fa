"""The passes. Adding one is a folder with `config.py` and `solver.py`, and a line in `PASSES`."""

from __future__ import annotations

from typing import Any

from .admm.config import ADMMConfig
from .admm.solver import solve as _admm
from .base import Needs, Pass, PruneResult, PruningConfig, StageConfig
from .gptq.config import GPTQConfig
from .gptq.solver import solve as _gptq
from .gqsa.config import GQSAConfig
from .gqsa.solver import solve as _gqsa
from .keep.config import KeepConfig
from .keep.solver import solve as _keep
from .magnitude.config import MagnitudeConfig
from .magnitude.solver import solve as _magnitude
from .rtn.config import RTNConfig
from .rtn.solver import solve as _rtn
from .sparsegpt.config import SparseGPTConfig
from .sparsegpt.solver import solve as _sparsegpt
from .wanda.config import WandaConfig
from .wanda.solver import solve as _wanda

PASSES: dict[str, Pass[Any]] = {
    "keep": Pass(KeepConfig, "nothing", _keep, (4, 0), "weights stay as they are, for a selection of inputs alone"),
    "magnitude": Pass(MagnitudeConfig, "nothing", _magnitude, (4, 0), "smallest weights go; needs no data"),
    "wanda": Pass(WandaConfig, "norms", _wanda, (4, 0), "smallest |weight| * input norm goes; no weight update"),
    "sparsegpt": Pass(
        SparseGPTConfig, "hessian", _sparsegpt, (10, 2), "optimal brain surgeon, column block by column block"
    ),
    "admm": Pass(ADMMConfig, "hessian", _admm, (16, 3), "least squares under a gradually tightening mask"),
    "rtn": Pass(RTNConfig, "nothing", _rtn, (4, 0), "integers by rounding to nearest; needs no data"),
    "gptq": Pass(GPTQConfig, "hessian", _gptq, (11, 2), "integers column by column, errors fed forward, then descent"),
    "gqsa": Pass(GQSAConfig, "hessian", _gqsa, (12, 3), "groups or N:M, pruned and quantized in one sweep"),
}


def needs_of(stage: StageConfig) -> Needs:
    """What a stage needs to know about a linear's inputs."""
    return "hessian" if stage.low_rank is not None else PASSES[stage.name].needs


__all__ = [
    "PASSES",
    "ADMMConfig",
    "GPTQConfig",
    "GQSAConfig",
    "MagnitudeConfig",
    "Pass",
    "PruneResult",
    "PruningConfig",
    "RTNConfig",
    "SparseGPTConfig",
    "StageConfig",
    "WandaConfig",
    "needs_of",
]
