"""`halfweight plan`."""

from __future__ import annotations

from . import options
from .output import human_seconds, out, table, write_json


def plan(
    model: options.Model,
    recipe: options.RecipeName = "2of4-admm",
    embeddings: options.EmbeddingBits = None,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what a compression would do: per-layer table, effective bits, peak memory, time. Reads no weights.

    Examples:

        halfweight plan demo --recipe 2of4-admm

        halfweight plan ./my-llama --recipe my-recipe.yaml --json plan.json
    """
    from ..compress.plan import plan as make_plan
    from ..compress.recipe import Recipe

    loaded = Recipe.load(recipe).with_embeddings(embeddings)
    result = make_plan(model, loaded, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    write_json(json, result)
    rows = table(f"{result.model} by {result.recipe}", "linear", "method", "pattern", "N x K", "bits", "->", left=3)
    for layer in result.layers:
        n, k = layer.shape
        rows.add_row(
            layer.name,
            layer.method,
            layer.pattern,
            f"{n} x {k}",
            f"{layer.bits_before:.2f}",
            f"{layer.bits_after:.2f}",
        )
    out.print(rows)
    out.print(
        f"effective bits: {result.effective_bits:.3f} (decoder linears),"
        f" {result.effective_bits_model:.3f} (whole model)\n"
        f"peak memory: about {result.peak_memory_gb:.2f} GB (modelled)\n"
        f"time: about {human_seconds(result.seconds)} on {result.device} in {result.dtype} (modelled)"
    )
