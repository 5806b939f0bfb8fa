"""`halfweight sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import human_seconds, out, progress_bars, say, table, write_json

if TYPE_CHECKING:
    from ..eval.sweep_report import SweepPoint, SweepReport


def sweep(
    model: options.Model,
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the result, the plot and resuming.")],
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="magnitude, wanda, sparsegpt, admm, random, erk-random.")
    ] = "magnitude,wanda,sparsegpt,random",
    patterns: Annotated[
        str, typer.Option(metavar="P,...", help="unstructured, N:M such as 2:4, groups such as group16.")
    ] = "unstructured,2:4,4:8",
    densities: Annotated[
        str, typer.Option(metavar="D,...", help="Kept shares, for patterns that do not fix their own.")
    ] = "0.9,0.8,0.7,0.6,0.5,0.4",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to score; default: the held-out text that ships.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first N windows; default: all.")] = None,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    plot: Annotated[bool, typer.Option(help="Draw DIR/sweep.svg and DIR/sweep.png (needs matplotlib).")] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what DIR holds of another or unfinished sweep.")
    ] = False,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.BlockDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """How far a model can be pruned: perplexity by method, pattern and density, with the knees of each curve.

    One walk through the model serves all; what DIR holds already is not computed again, so more can be added later.

    Examples:

        halfweight sweep demo --out smollm2-sweep

        halfweight sweep ./my-llama --out sweep --methods wanda,admm,erk-random --patterns unstructured,group16,2:4
    """
    from ..compress.memory import return_large_buffers
    from ..compress.recipe import Recipe
    from ..compress.sparsity_sweep import sweep as run
    from ..eval.sweep_report import plot_sweep, require_matplotlib

    if plot:
        require_matplotlib()
    settings = Recipe.load("2of4-magnitude").with_calibration(
        data=calibration, samples=samples, seqlen=seqlen, seed=seed
    )
    return_large_buffers()
    with progress_bars() as progress:
        report = run(
            model,
            output,
            methods=options.names(methods, "--methods"),
            patterns=options.names(patterns, "--patterns"),
            densities=options.numbers(densities, "--densities"),
            calibration=settings.calibration,
            text=text,
            windows=windows,
            seqlen=seqlen or 1024,
            device=device,
            dtype=dtype,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json, report)
    if plot:
        for suffix in ("svg", "png"):
            plot_sweep(report, output / f"sweep.{suffix}")
    show(report)


def show(report: SweepReport) -> None:
    """Perplexity over dense by density, one row per method and pattern, with the knees."""
    columns = sorted({point.density for point in report.points}, reverse=True)
    kept = [f"{density:g}" for density in columns]
    rows = table("perplexity / dense, by kept share", "", *kept, "1 %", "5 %", "bend")
    found = {(point.method, point.pattern, point.density): point for point in report.points}
    curves = {(curve.method, curve.pattern): curve for curve in report.curves}
    for method, pattern in dict.fromkeys((point.method, point.pattern) for point in report.points):
        curve = curves.get((method, pattern))
        knees = ["", "", ""]
        if curve is not None:
            bend = "-" if curve.shape is None else f"{100 * curve.shape:g} %"
            knees = [f"{100 * curve.tolerance_1:g} %", f"{100 * curve.tolerance_5:g} %", bend]
        rows.add_row(
            f"{method} {pattern}", *(_ratio(found.get((method, pattern, density))) for density in columns), *knees
        )
    out.print(rows)
    for skipped in report.skipped:
        say(f"skipped {skipped.method} {skipped.pattern}: {skipped.reason}")
    bos = ", first token replaced by BOS" if report.bos else ""
    out.print(
        f"1 %, 5 %: largest sparsity with at most that much more perplexity; bend: where its logarithm bends most\n"
        f"dense perplexity {report.dense_perplexity:.3f} on {report.text}, {report.windows} windows of"
        f" {report.seqlen}{bos}; {report.calibration_samples} calibration windows of {report.calibration_seqlen} of"
        f" {report.calibration_data}, seed {report.seed}; {report.dtype} on {report.device},"
        f" {human_seconds(report.seconds)}"
    )


def _ratio(point: SweepPoint | None) -> str:
    if point is None:
        return ""
    return f"{point.ratio:.3f}" if point.ratio < 100 else f"{point.ratio:.0e}"
