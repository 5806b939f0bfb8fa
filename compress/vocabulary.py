"""Rounding the embedding and the head to integers, some rows at a time: in small models they are most of the bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..serving.checkpoint import Checkpoint, read_header
from ..serving.embedding import swap_embedding
from ..serving.errors import RunError
from ..serving.skeleton import build_skeleton
from ..serving.storage import pack_weight, tensor_specs
from ..serving.tables import Table
from .passes.base import IntegerSettings
from .passes.quantization import CodeRange, quantize
from .report import TableReport

PART = "vocabulary.safetensors"
_NUMBERS = 2**20  # rounded at a time; in fp32 the search needs a few times as much


def check_supported(checkpoint: Checkpoint, settings: IntegerSettings) -> None:
    """Raise InputError when the embedding of the model in `checkpoint` does something that integers could not."""
    swap_embedding(build_skeleton(checkpoint, torch.float32), settings.integers())


def quantize_tables(
    tables: Iterable[Table], settings: IntegerSettings, device: torch.device
) -> tuple[list[TableReport], dict[str, Tensor]]:
    """`quantize_table` for each of `tables`; the stored tensors by full name."""
    reports, packed = [], {}
    for table in tables:
        report, tensors = quantize_table(table, settings, device)
        reports.append(report)
        packed.update({f"{table.name}.{suffix}": tensor for suffix, tensor in tensors.items()})
    return reports, packed


def quantized(table: Table, settings: IntegerSettings, file: Path) -> Table:
    """The form of the dense `table` that `file` holds."""
    scheme, stored = settings.integers().dense, read_header(file)
    tensors = {suffix: stored[f"{table.name}.{suffix}"] for suffix in tensor_specs(scheme, table.shape)}
    return Table(table.name, table.shape, tensors, scheme)


def quantize_table(
    table: Table, settings: IntegerSettings, device: torch.device
) -> tuple[TableReport, dict[str, Tensor]]:
    """The stored tensors of a dense `table` `[R, C]` by suffix, grouped along C, and how far they are from it.

    Every group gets the range with the least squared error of its weights. Raises RunError for weights that are not
    finite.
    """
    scheme, (rows, columns) = settings.integers().dense, table.shape
    specs = tensor_specs(scheme, table.shape)
    packed = {suffix: torch.empty(spec.shape, dtype=spec.dtype) for suffix, spec in specs.items()}
    allowed = CodeRange.of(settings.bits, settings.symmetric)
    step = max(1, _NUMBERS // columns)
    lost = total = 0.0
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = table.read(part, torch.float32, device)
        if not bool(torch.isfinite(weight).all()):
            raise RunError(f"{table.name}: its weights are not finite; check the checkpoint for damage")
        codes, values = quantize(weight, None, allowed, settings.group_size, settings.candidates)
        if not bool(torch.isfinite(values).all()):
            raise RunError(f"{table.name}: its weights are too large for the scales of integers; leave embeddings out")
        for suffix, tensor in pack_weight(values, scheme, codes).items():
            packed[suffix][part] = tensor.cpu()
        lost += float((values - weight).double().square().sum())
        total += float(weight.double().square().sum())
    error = lost / total if total else 0.0
    return TableReport(name=table.name, shape=table.shape, numbers=scheme.numbers, error=error), packed
