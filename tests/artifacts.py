"""Compressed checkpoints of a tiny model: loading them, and reading what they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.serving.checkpoint import INDEX_NAME

IDS = torch.arange(3, 27)[None]
Q = "model.layers.0.self_attn.q_proj"

LOADERS: dict[str, Callable[[Path], Any]] = {
    "load": halfweight.load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the folder's index names."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    files = {name: load_file(folder / name) for name in sorted(set(index["weight_map"].values()))}
    assert {k for tensors in files.values() for k in tensors} == set(index["weight_map"])
    return {tensor: files[name][tensor] for tensor, name in index["weight_map"].items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a[name], b[name])]
        assert torch.equal(*bits), name


def run_python(code: str, *arguments: str | Path, isolated: bool = False) -> Any:
    """Run `code` in a fresh interpreter (`isolated`: site-packages only) and parse the JSON on its last line."""
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
