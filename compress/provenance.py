"""What a compression was made from, for its report: hashes of the model, the text and the code, and versions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..serving.checkpoint import Checkpoint
from ..serving.durable import sha256_of
from .calibration import Windows
from .report import Provenance
from .writer import companions

_PACKAGE = Path(__file__).resolve().parents[1]
_CODE = ("compress", "eval", "serving", "triton_kernels")  # what an artifact can depend on


def of_run(checkpoint: Checkpoint, windows: Windows) -> Provenance:
    """The provenance of a run on `checkpoint` and `windows`; takes as long as reading the model's files."""
    return Provenance(
        model=model_hashes(checkpoint),
        text=windows.text_sha256,
        code=code_hash(),
        threads=torch.get_num_threads(),
    )


def model_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 by name of the files that a run reads: config, tensors, tokenizer and what is copied with them."""
    shards = {info.file for info in checkpoint.tensors.values()}
    files = {checkpoint.path / "config.json", *shards, *companions(checkpoint.path)}
    return {file.name: sha256_of(file) for file in sorted(files)}


def code_hash() -> str:
    """SHA-256 over halfweight's source files: tells development versions apart that share a number."""
    digest = hashlib.sha256()
    files = [file for folder in _CODE for file in (_PACKAGE / folder).rglob("*.py")]
    for file in sorted(files):
        digest.update(f"{file.relative_to(_PACKAGE).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of halfweight, Python and the libraries that the numbers depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    return {"halfweight": __version__, "python": platform.python_version(), **libraries}
