"""`halfweight inspect`."""

from __future__ import annotations

from . import options
from .output import human_bytes, out, table, write_json


def inspect(folder: options.Folder, json: options.Json = None) -> None:
    """Show what a checkpoint holds: per-layer pattern, numbers, density, bits and error.

    Examples:

        halfweight inspect smollm2-2of4

        halfweight inspect smollm2-2of4 --json layers.json
    """
    from ..serving.inspect import inspect_checkpoint

    result = inspect_checkpoint(folder)
    write_json(json, result)
    rows = table(result.path, "linear", "pattern", "numbers", "N x K", "density", "bits", "error", left=3)
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
