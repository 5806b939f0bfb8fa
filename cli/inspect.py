"""`halfweight inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import human_bytes, out, table, write_json

if TYPE_CHECKING:
    from ..serving.inspect import LayerInfo


def inspect(
    folder: options.Folder,
    device: Annotated[
        str | None, typer.Option(help="Also show what would run each linear on auto, cpu, cuda or cuda:i.")
    ] = None,
    dtype: options.Dtype = "auto",
    json: options.Json = None,
) -> None:
    """Show what a checkpoint holds: per-layer pattern, numbers, density, bits and error.

    Examples:

        halfweight inspect smollm2-2of4

        halfweight inspect smollm2-2of4 --json layers.json

        halfweight inspect smollm2-2of4 --device cpu
    """
    from ..serving.inspect import inspect_checkpoint

    result = inspect_checkpoint(folder, device=device, dtype=dtype)
    write_json(json, result)
    headers = ["linear", "pattern", "numbers", "N x K", "density", "bits", "error", *(["runs on"] if device else [])]
    rows = table(result.path, *headers, left=3)
    for layer in result.layers:
        n, k = layer.shape
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        rows.add_row(
            layer.name,
            layer.pattern,
            layer.numbers,
            f"{n} x {k}",
            f"{layer.density:.3f}",
            f"{layer.bits:.2f}",
            error,
            *([_runs_on(layer)] if device else []),
        )
    out.print(rows)
    ratio = (
        ""
        if result.linear_bytes_ratio is None
        else f"; compressed linears at {result.linear_bytes_ratio:.4f} of 16 bits"
    )
    out.print(
        f"effective bits: {result.effective_bits:.3f} (decoder linears),"
        f" {result.effective_bits_model:.3f} (whole model)"
        f"{ratio}; {human_bytes(result.bytes)}"
    )


def _runs_on(layer: LayerInfo) -> str:
    """The kernels that would run, or why none or others would."""
    if layer.backend is None:
        return "dense"
    if layer.form is not None:
        return str(layer.reason)
    return f"{layer.backend}: {layer.reason}" if layer.backend == "reference" else layer.backend
