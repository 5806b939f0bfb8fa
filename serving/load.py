"""`load`: a runnable model and its tokenizer from a folder, dense or compressed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import torch

from . import verdicts as speed_verdicts
from .checkpoint import Checkpoint
from .errors import InputError, did_you_mean
from .linear import Backend, CompressedWeight
from .skeleton import build_skeleton
from .warmup import expect

DTYPE_NAMES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU; raises InputError for a device this machine lacks."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r} is unknown; use auto, cpu, cuda or cuda:0") from None
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise InputError(f"device {str(device)!r} is not on this machine ({count} CUDA devices); use auto or cpu")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Compute dtype: `"auto"` is float32 on a CPU (its 16-bit matmuls are slow or inexact) and `stored` on a GPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    try:
        return DTYPE_NAMES[dtype]
    except KeyError:
        raise InputError(f"dtype {dtype!r} is unknown; use auto, float32, bfloat16 or float16") from None


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that holds most of the checkpoint's bytes."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise InputError(f"{checkpoint.path}: no floating-point tensors in the checkpoint")
    return max(sizes, key=lambda dtype: sizes[dtype])


_log = logging.getLogger("halfweight")


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    backend: str = "auto",
    batch_size: int = 1,
    verdicts: bool = True,
) -> Any:
    """Load a checkpoint folder, dense or compressed, as a transformers causal language model in eval mode.

    `device` is `auto`, `cpu`, `cuda` or `cuda:i`; `dtype` is `auto` (see `resolve_dtype`), a name or a torch dtype.
    `backend` is what runs the compressed weights: `auto` (the fastest that can; `explain` says which and why),
    `reference`, or `triton` or `cpu`, which are refused where they cannot run. Speed verdicts that the folder holds for
    this device and dtype and for decoding `batch_size` sequences at a time are honoured with `auto`, and one line on
    the logger `halfweight` says what that costs in memory; `verdicts=False` ignores them. The model may be called from
    several threads. Raises InputError, one line each, for a missing or damaged folder, an unknown format version,
    tensors of a wrong shape, missing tensors, and metadata that does not describe a valid pattern.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(path)
    build_skeleton(checkpoint, torch.float32)  # refuses what transformers would load with random weights
    chosen = next((known for known in get_args(Backend) if known == backend), None)
    if chosen is None:
        raise InputError(f"backend {backend!r} is unknown{did_you_mean(backend, list(get_args(Backend)))}")
    where = resolve_device(device)
    computed = resolve_dtype(dtype, where, stored_dtype(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=computed, local_files_only=True)
    model = model.to(where).eval()
    choose_backend(model, chosen)
    judged = verdicts and backend == "auto"
    entry = speed_verdicts.find(checkpoint.path, where, computed, batch_size) if judged else None
    if entry is not None:
        applied = speed_verdicts.apply(model, entry, computed, str(checkpoint.path / speed_verdicts.FILE))
        if applied.extra_bytes:
            _log.warning("%s: %s holds %s", checkpoint.path, speed_verdicts.FILE, applied)
    return model


def choose_backend(model: Any, backend: Backend) -> None:
    """Make `backend` run every compressed weight of `model`; raises InputError, with the reason, where it cannot."""
    for name, module in model.named_modules():
        if not isinstance(module, CompressedWeight):
            continue
        if backend in ("triton", "cpu"):
            kind = expect(name, module.scheme, module.shape, model.dtype, model.device, module.op)
            if kind.backend != backend:
                reason = kind.reason if kind.backend == "reference" else f"this device takes {kind.backend}"
                raise InputError(f"{name}: backend {backend!r} cannot run it ({reason}); use backend='auto'")
        module.backend = backend


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer; raises InputError when the folder has none that loads without remote code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # as above
        raise InputError(f"{path}: no usable tokenizer ({' '.join(str(error).split())})") from None
    files = tokenizer.vocab_files_names.values()
    if not any((Path(path) / file).is_file() for file in files):  # transformers 5.0 makes up an empty one
        raise InputError(f"{path}: no usable tokenizer (none of {', '.join(files)})")
    return tokenizer
