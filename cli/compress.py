"""`halfweight compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..serving.errors import InputError
from . import options
from .output import human_bytes, human_seconds, out, progress_bars, say, table, write_json

if TYPE_CHECKING:
    from ..compress.report import CompressionReport
    from ..compress.target import TargetReport


def compress(
    model: options.Model,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to create.")],
    recipe: options.RecipeName = "2of4-admm",
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    embeddings: options.EmbeddingBits = None,
    tuning: options.Tuning = None,
    tuning_samples: options.TuningSamples = None,
    block_epochs: options.BlockEpochs = None,
    end_to_end_epochs: options.EndToEndEpochs = None,
    search: options.Search = None,
    search_trials: options.SearchTrials = None,
    target_ppl_increase: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="P",
            help="Find the largest sparsity at which the dev perplexity grows by at most P %, in six compressions.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty DIR when done.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard unfinished work in DIR.partial.")] = False,
    activation_memory: options.ActivationMemory = None,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.BlockDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Calibrate, compress, write, reload and verify. An interrupted run resumes with the same command.

    Under torchrun, processes share the work, each with a part of the calibration windows (docs/distributed.md).

    Examples:

        halfweight compress demo --recipe 2of4-admm --out smollm2-2of4

        halfweight compress ./my-llama --recipe 2of4-sparsegpt --out my-2of4 --calibration text.jsonl --samples 64

        halfweight compress demo --recipe gqsa-w4s50 --embeddings 8 --out smollm2-w4s50

        halfweight compress ./my-llama --recipe w4-g64-best --out my-w4 --tuning-samples 512 --block-epochs 2

        halfweight compress ./my-llama --recipe gqsa-w4s50 --out my-w4s50 --samples 256 --activation-memory 2

        halfweight compress demo --recipe teal-50 --target-ppl-increase 5 --out smollm2-ppl5

        torchrun --nproc-per-node 8 -m halfweight compress ./my-llama --recipe gqsa-w4s50 --out my-w4s50

        halfweight compress demo --recipe rsparse-50 --search evolution --out smollm2-searched
    """
    from ..compress.driver import compress_checkpoint
    from ..compress.memory import return_large_buffers
    from ..compress.recipe import Recipe
    from ..compress.target import TargetReport, compress_to_target
    from ..compress.world import join

    return_large_buffers()
    with join(device) as world, progress_bars() as progress:
        if world.size > 1 and target_ppl_increase is not None:
            raise InputError("--target-ppl-increase compresses many times, in one process; run it without torchrun")
        loaded = Recipe.load(recipe).with_calibration(data=calibration, samples=samples, seqlen=seqlen, seed=seed)
        loaded = loaded.with_embeddings(embeddings).with_search(search, search_trials)
        loaded = loaded.with_tuning(
            tuning, samples=tuning_samples, block_epochs=block_epochs, end_to_end_epochs=end_to_end_epochs
        )
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        settings |= {"overwrite": overwrite, "fresh": fresh, "activation_memory": activation_memory}
        result: CompressionReport | TargetReport
        if target_ppl_increase is None:
            result = compress_checkpoint(model, loaded, output, progress=progress, world=world, **settings)
        else:
            share = target_ppl_increase / 100
            result = compress_to_target(model, loaded, output, share, progress=progress, **settings)
    if not world.leads:
        return
    write_json(json, result)
    if isinstance(result, TargetReport):
        show_trials(result)
        result = result.report
    show(result)


def show_trials(found: TargetReport) -> None:
    """The trials of a compression to a target, and the one that was kept."""
    rows = table("trials", "removed", "dev perplexity", "", left=0)
    for trial in found.trials:
        kept = "kept" if trial.removed == found.removed else ""
        rows.add_row(f"{trial.removed:.1%}", f"{trial.increase:+.2%}", kept)
    out.print(rows)
    out.print(f"the dev perplexity may grow by {100 * found.target:g} %")


def show(report: CompressionReport) -> None:
    """The summary table of a finished compression."""
    from ..eval.selection import inputs_read

    if report.note:
        say(f"note: {report.note}")
    worst = max(report.layers, key=lambda layer: layer.error)
    rows = table(f"{report.out}: {report.model} by {report.recipe}", "", "", left=2)
    rows.add_row(
        "linears compressed",
        f"{len(report.layers)} in {report.blocks} blocks ({report.blocks_resumed} resumed)",
    )
    rows.add_row(
        "effective bits",
        f"{report.effective_bits:.3f} linears, {report.effective_bits_model:.3f} whole model",
    )
    rows.add_row("size on disk", human_bytes(report.bytes))
    rows.add_row("relative output error", f"worst {worst.error:.3f} at {worst.name}")
    if read := inputs_read({layer.name: layer.stats for layer in report.layers}):
        rows.add_row("inputs read", read)
    if experts := [layer for layer in report.layers if "by_magnitude" in layer.stats]:
        rare = [layer for layer in experts if layer.stats["by_magnitude"] > 0]
        unseen = sum(layer.stats["tokens"] == 0 for layer in rare)
        rows.add_row(
            "linears of experts",
            f"{len(rare)} of {len(experts)} saw fewer tokens than inputs (partly by magnitude), {unseen} none",
        )
    for rounded in report.tables:
        n, k = rounded.shape
        rows.add_row(f"{n} x {k} table", f"{rounded.name} as {rounded.numbers}, relative error {rounded.error:.1e}")
    if report.searched is not None:
        settings, best = report.searched.settings, report.search[report.searched.chosen]
        change = f"{settings.objective} {report.search[0].objective:.4f} -> {best.objective:.4f} on dev windows"
        rows.add_row("searched", f"{settings.method}, {len(report.search)} trials: {change}")
    for line in tuning_lines(report):
        rows.add_row(*line)
    rows.add_row(
        "dev perplexity",
        f"dense {report.dev.dense:.2f} -> compressed {report.dev.compressed:.2f} ({report.dev.tokens} tokens,"
        f" {report.calibration_data} text held out)",
    )
    rows.add_row("verified", f"reloaded outputs differ by {report.verification.relative_difference:.1e}")
    shared = f" in the largest of {report.processes} processes" if report.processes > 1 else ""
    rows.add_row("time, peak memory", f"{human_seconds(report.seconds)}, {report.peak_rss_gb:.2f} GB{shared}")
    out.print(rows)


def tuning_lines(report: CompressionReport) -> list[tuple[str, str]]:
    """What tuning did, in words: to the blocks together, to the whole model, and what went wrong."""
    lines = []
    blocks = [row for row in report.tuning if row.stage == "block"]
    if blocks:
        share = sum(row.best / row.start for row in blocks) / len(blocks)
        steps = sum(row.steps for row in blocks)
        lines.append(("tuned by block", f"{steps} steps, errors on the dev set to {share:.2f} of what they were"))
    for row in report.tuning:
        if row.stage == "end_to_end":
            lines.append(("tuned end to end", f"{row.steps} steps, dev loss {row.start:.4f} -> {row.best:.4f}"))
        if row.note is not None:
            lines.append((f"note on {row.name}", row.note))
    return lines
