"""`halfweight plan`."""

from __future__ import annotations

from typing import Any

from . import options
from .output import human_seconds, out, table, write_json

STAGE_NAMES = {
    "basis": "change basis",
    "allocation": "allocate",
    "search": "search",
    "metric": "weigh errors",
    "compress": "compress",
    "block": "tune by block",
    "end_to_end": "tune end to end",
}


def plan(
    model: options.Model,
    recipe: options.RecipeName = "2of4-admm",
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    embeddings: options.EmbeddingBits = None,
    tuning: options.Tuning = None,
    tuning_samples: options.TuningSamples = None,
    block_epochs: options.BlockEpochs = None,
    end_to_end_epochs: options.EndToEndEpochs = None,
    search: options.Search = None,
    search_trials: options.SearchTrials = None,
    activation_memory: options.ActivationMemory = None,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.BlockDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what a compression would do: per-layer table, effective bits, memory, disk, time. Reads no weights.

    A folder that holds nothing but a config.json is enough.

    Examples:

        halfweight plan demo --recipe 2of4-admm

        halfweight plan ./my-llama --recipe my-recipe.yaml --json plan.json

        halfweight plan ./llama-8b --recipe 2of4-w4-best --tuning-samples 512
    """
    from ..compress.plan import plan as make_plan
    from ..compress.recipe import Recipe

    loaded = Recipe.load(recipe).with_calibration(samples=samples, seqlen=seqlen)
    loaded = loaded.with_embeddings(embeddings).with_search(search, search_trials)
    loaded = loaded.with_tuning(
        tuning, samples=tuning_samples, block_epochs=block_epochs, end_to_end_epochs=end_to_end_epochs
    )
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    result = make_plan(model, loaded, activation_memory=activation_memory, **settings)
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
    stages = table("stages (modelled)", "stage", "tokens", "device", "host", "disk", "time")
    for stage in result.stages:
        stages.add_row(
            STAGE_NAMES[stage.name],
            f"{stage.tokens}",
            f"{stage.device_gb:.2f} GB",
            f"{stage.host_gb:.2f} GB",
            f"{stage.disk_gb:.2f} GB",
            human_seconds(stage.seconds),
        )
    if len(result.stages) > 1:
        out.print(stages)
    place = "in files, a batch at a time in memory" if result.activations_spill else "in memory"
    out.print(
        f"effective bits: {result.effective_bits:.3f} (decoder linears),"
        f" {result.effective_bits_model:.3f} (whole model)\n"
        f"peak memory: about {result.peak_memory_gb:.2f} GB (modelled)\n"
        f"activations: about {result.activations_gb:.2f} GB, {place}\n"
        f"time: about {human_seconds(result.seconds)} on {result.device} in {result.dtype} (modelled)"
    )
