"""The state of an end-to-end training on disk: one file, replaced whole, that knows which run it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..writer import write_part

FILE = "training.safetensors"
_NOTE = "halfweight"


def save(file: Path, run: str, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace `file` by the state of the run with fingerprint `run`; `facts` are plain JSON. Raises RunError."""
    here = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    note = json.dumps({"run": run, "sha256": _digest(here), "facts": facts})
    write_part(file, here, {_NOTE: note})


def load(file: Path, run: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts that `save` wrote for `run`; None when there are none, or they are another run's or damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), "pt") as stored:
            note = json.loads((stored.metadata() or {}).get(_NOTE, "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, json.JSONDecodeError):
        return None
    if note.get("run") != run or note.get("sha256") != _digest(tensors):
        return None
    return tensors, note["facts"]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
