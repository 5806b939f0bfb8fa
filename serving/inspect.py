"""What a checkpoint really holds: per-layer pattern, density and bits, read from its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from . import verdicts
from .checkpoint import Checkpoint, TensorInfo, read_json
from .linear import CompressedWeight
from .load import resolve_device, resolve_dtype, stored_dtype
from .scheme import LinearScheme
from .skeleton import build_skeleton, find_blocks, is_linear, tensor_names, tied_names
from .storage import weight_specs
from .tables import Table
from .warmup import expect

_REPORT = "report.json"
_NUMBERS = 2**22  # looked at together


class LayerInfo(BaseModel):
    """One decoder linear, or quantized embedding or head, `[N, K]`. `density` is the measured fraction of non-zeros,
    `bits` are stored per weight, both with a low-rank branch in the bits alone. `error` is the relative error that
    compression reported: of a linear's outputs on held-out text, of a table's weights (None for an untouched layer).
    When a device was asked for, `backend` and `reason` say what would run a compressed linear there, and `form` as what
    where a speed verdict for decoding one sequence has another form than the stored one."""

    name: str
    shape: tuple[int, int]
    pattern: str
    numbers: str
    density: float
    bits: float
    error: float | None
    backend: str | None = None
    reason: str | None = None
    form: str | None = None


class Inspection(BaseModel):
    """`effective_bits`: stored bits of the decoder blocks' linears, biases and metadata included, per original
    parameter; `effective_bits_model` adds embeddings, head and norms. `linear_bytes_ratio`: the compressed linears'
    weights over their size at 16 bits (None when nothing is compressed)."""

    path: str
    format_version: int | None
    effective_bits: float
    effective_bits_model: float
    linear_bytes_ratio: float | None
    bytes: int
    layers: list[LayerInfo]


def inspect_checkpoint(
    path: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> Inspection:
    """Inspect a checkpoint folder, dense or compressed. Reads each linear once; raises InputError for a bad folder.

    With a `device`, also what would run each compressed linear there on activations of `dtype`, speed verdicts heeded.
    """
    checkpoint = Checkpoint(path)
    place = _place(checkpoint, device, dtype)
    artifact = checkpoint.artifact
    model = build_skeleton(checkpoint, torch.float32)
    prefix, _ = find_blocks(model)
    names = tensor_names(model, checkpoint.tensors)
    schemes = artifact.linears if artifact is not None else {}
    errors = _reported_errors(checkpoint.path)

    known = dict(model.named_modules())
    whole = {n: m for n, m in known.items() if not isinstance(known[n.rpartition(".")[0]], CompressedWeight)}
    modules = {n: m for n, m in whole.items() if n.startswith(prefix + ".") and is_linear(m)}
    tables = {n: m for n, m in whole.items() if n not in modules and isinstance(m, CompressedWeight)}
    layers = []
    linears, vocabulary = _Size(), _Size()
    compressed_bits = compressed_weights = 0
    for done, (name, module) in enumerate({**modules, **tables}.items(), 1):
        stored = {key: checkpoint.info(names[f"{name}.{key}"]) for key in module.state_dict(keep_vars=True)}
        scheme = module.scheme if isinstance(module, CompressedWeight) else schemes.get(name)
        shape = module.shape if isinstance(module, CompressedWeight) else (module.out_features, module.in_features)
        bits = 8 * sum(info.nbytes for key, info in stored.items() if key != "bias")
        size = linears if name in modules else vocabulary
        size.bits += bits + (8 * stored["bias"].nbytes if "bias" in stored else 0)
        size.parameters += shape[0] * shape[1] + (shape[0] if "bias" in stored else 0)
        if name in modules and name in schemes:
            compressed_bits += bits
            compressed_weights += shape[0] * shape[1]
        own = ("weight",) if scheme is None else tuple(weight_specs(scheme, shape))
        non_zeros = _non_zeros(Table(name, shape, {key: stored[key] for key in own}, scheme))
        layers.append(
            LayerInfo(
                name=name,
                shape=shape,
                pattern="dense" if scheme is None else scheme.pattern,
                numbers=_numbers(scheme, stored),
                density=non_zeros / (shape[0] * shape[1]),
                bits=bits / (shape[0] * shape[1]),
                error=errors.get(name),
                **_runs(module, scheme, shape, place, f"{checkpoint.path / verdicts.FILE}: {name}"),
            )
        )
        if progress is not None:
            progress(done, len(modules) + len(tables))

    inside = tuple(f"{name}." for name in (*modules, *tables))
    outside = [checkpoint.info(n) for k, n in names.items() if not k.startswith(inside) and k not in tied_names(model)]
    outside_parameters = vocabulary.parameters + sum(torch.Size(info.shape).numel() for info in outside)
    outside_bits = vocabulary.bits + 8 * sum(info.nbytes for info in outside)
    return Inspection(
        path=str(path),
        format_version=artifact.format_version if artifact is not None else None,
        effective_bits=linears.bits / linears.parameters,
        effective_bits_model=(linears.bits + outside_bits) / (linears.parameters + outside_parameters),
        linear_bytes_ratio=compressed_bits / (16 * compressed_weights) if compressed_weights else None,
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        layers=layers,
    )


@dataclass
class _Size:
    """Stored bits, and the parameters they stand for."""

    bits: int = 0
    parameters: int = 0


def _non_zeros(table: Table) -> int:
    """Non-zero weights, counted over some rows at a time where rows are stored apart."""
    rows, columns = table.shape
    if table.scheme is not None and not table.scheme.rows_apart:
        return int(table.whole(torch.float32).count_nonzero())
    step = max(1, _NUMBERS // columns)
    parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return sum(int(table.read(part, torch.float32).count_nonzero()) for part in parts)


@dataclass(frozen=True)
class _Place:
    """Where linears would run, and the speed verdicts that the folder holds for it."""

    device: torch.device
    dtype: torch.dtype
    entry: verdicts.Entry | None


def _place(checkpoint: Checkpoint, device: str | None, dtype: str) -> _Place | None:
    if device is None:
        return None
    where = resolve_device(device)
    computed = resolve_dtype(dtype, where, stored_dtype(checkpoint))
    return _Place(where, computed, verdicts.find(checkpoint.path, where, computed, tokens=1))


def _runs(
    module: nn.Module, scheme: LinearScheme | None, shape: tuple[int, int], place: _Place | None, where: str
) -> dict[str, str]:
    """`backend`, `reason` and `form` for a compressed linear at `place`."""
    if scheme is None or place is None:
        return {}
    op = module.op if isinstance(module, CompressedWeight) else None  # its pattern has no packed form
    change = None if op is None or place.entry is None else verdicts.form_of(place.entry, op, scheme, shape, where)
    if change is None:
        choice = expect("", scheme, shape, place.dtype, place.device, op)
        return {"backend": choice.backend, "reason": choice.reason}
    form, reason = change
    if form == "dense":
        return {"backend": "dense", "reason": reason, "form": form}
    choice = expect("", verdicts.int4_scheme(scheme), shape, place.dtype, place.device)
    return {"backend": choice.backend, "reason": f"{choice.reason}; {reason}", "form": form}


def _numbers(scheme: LinearScheme | None, stored: Mapping[str, TensorInfo]) -> str:
    """How a linear's kept weights are stored: `int4 g64`, or the floating-point dtype."""
    if scheme is not None and scheme.integers is not None:
        return scheme.numbers
    kind = next(str(info.dtype).removeprefix("torch.") for info in stored.values() if info.dtype.is_floating_point)
    return kind if scheme is None else kind + scheme.extras


def _reported_errors(folder: Path) -> dict[str, float]:
    """Per-layer errors from the compression report beside the weights, when there is one."""
    if not (folder / _REPORT).is_file():
        return {}
    report = read_json(folder / _REPORT)
    return {str(layer["name"]): float(layer["error"]) for key in ("layers", "tables") for layer in report.get(key, [])}
