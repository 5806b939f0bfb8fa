"""Whether models fit in memory, asked before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from ..serving.checkpoint import Checkpoint
from ..serving.errors import InputError
from ..serving.load import resolve_device, resolve_dtype, stored_dtype


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the checkpoint's tensors once loaded for computing in `dtype`; integers stay as they are stored."""
    return sum(
        info.nbytes // info.dtype.itemsize * dtype.itemsize if info.dtype.is_floating_point else info.nbytes
        for info in checkpoint.tensors.values()
    )


def require_fit(models: Sequence[str | Path], device: str, dtype: str) -> None:
    """Raise InputError when `models`, all loaded at once, do not fit into the memory that is free on `device`."""
    where = resolve_device(device)
    needed = 0
    for model in models:
        checkpoint = Checkpoint(model)
        needed += loaded_bytes(checkpoint, resolve_dtype(dtype, where, stored_dtype(checkpoint)))
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        names = " and ".join(str(model) for model in models)
        raise InputError(
            f"{names}: {needed / 1e9:.1f} GB of weights, but {where} has {free / 1e9:.1f} GB free;"
            " use another --device, --dtype bfloat16, or free some memory"
        )
