"""A checkpoint as its config alone describes it, for plans of models whose weights are not here yet."""

from __future__ import annotations

from pathlib import Path

import torch

from ..serving.checkpoint import Checkpoint, TensorInfo, read_json
from ..serving.experts import unfuse
from ..serving.skeleton import load_config, tied_names


class Outline(Checkpoint):
    """Names, shapes and dtypes of the tensors that the model in `path`'s config.json has; none can be read."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the config is unreadable or not a causal language model's."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        file = path / "config.json"
        self.path, self.config = path, read_json(file)
        config = load_config(self)
        dtype = getattr(config, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            unfuse(model)
        tied = tied_names(model)
        self.tensors = {
            name: TensorInfo(file, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }


def has_weights(path: Path) -> bool:
    """Whether the folder `path` holds safetensors."""
    return any(path.glob("*.safetensors"))
