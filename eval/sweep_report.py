"""The result of a sparsity sweep as data, its knees, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..serving.durable import commit, disk_errors
from ..serving.errors import InputError
from .metrics import shape_knee, tolerance_knee

_CONTROLS = ("random", "erk-random")


class SweepPoint(BaseModel):
    """The whole model pruned by `method` to `density` (kept share of the decoder linears' weights) in `pattern`.

    `ratio` is its perplexity over the dense model's; `ratio_standard_error` is paired, from the windows' loss
    differences (None for one window).
    """

    method: str
    pattern: str
    density: float
    perplexity: float
    ratio: float
    ratio_standard_error: float | None

    @property
    def sparsity(self) -> float:
        """Removed share of the weights."""
        return 1 - self.density


class SweepCurve(BaseModel):
    """Knees of one method and pattern, as sparsities: `tolerance_1` and `tolerance_5` are the largest measured ones
    with at most 1 % and 5 % more perplexity (0: none was), `shape` is where log perplexity bends most (None when
    nothing got worse). Definitions: `metrics.tolerance_knee`, `metrics.shape_knee`."""

    method: str
    pattern: str
    tolerance_1: float
    tolerance_5: float
    shape: float | None


class Skipped(BaseModel):
    """A combination that does not exist, and why."""

    method: str
    pattern: str
    reason: str


class SweepReport(BaseModel):
    """Result of `sweep`. Perplexities are of `windows` windows of `seqlen` of `text`; statistics are of
    `calibration_samples` windows of `calibration_seqlen` of `calibration_data`, inputs of the dense model."""

    model: str
    dense_perplexity: float
    dense_standard_error: float | None
    points: list[SweepPoint]
    curves: list[SweepCurve]
    skipped: list[Skipped]
    text: str
    windows: int
    seqlen: int
    bos: bool
    calibration_data: str
    calibration_samples: int
    calibration_seqlen: int
    seed: int
    dtype: str
    device: str
    resumed_points: int
    resumed_blocks: int
    seconds: float
    versions: dict[str, str]


def curves_of(points: Sequence[SweepPoint]) -> list[SweepCurve]:
    """Knees of every method and pattern with more than one density."""
    curves = []
    for method, pattern in dict.fromkeys((point.method, point.pattern) for point in points):
        own = sorted((p for p in points if (p.method, p.pattern) == (method, pattern)), key=lambda p: p.sparsity)
        if len(own) < 2:
            continue
        sparsity, ratio = [round(p.sparsity, 6) for p in own], [p.ratio for p in own]
        curves.append(
            SweepCurve(
                method=method,
                pattern=pattern,
                tolerance_1=tolerance_knee(sparsity, ratio, 0.01),
                tolerance_5=tolerance_knee(sparsity, ratio, 0.05),
                shape=shape_knee(sparsity, ratio) if ratio[-1] > 1 else None,
            )
        )
    return curves


def require_matplotlib() -> None:
    """Raise InputError, with the command that installs it, when matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plot needs matplotlib: pip install 'halfweight[report]', or pass --no-plot") from None


def plot_sweep(report: SweepReport, file: Path) -> None:
    """Perplexity ratio (log scale) against sparsity, a line per method and pattern, knees marked; SVG, PNG or PDF.

    Controls leave the picture where they would press everything else to its bottom.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    labels: dict[tuple[str, str], Any] = {}
    bottom, top = limits(report.points)
    for number, (method, pattern) in enumerate(dict.fromkeys((p.method, p.pattern) for p in report.points)):
        own = sorted((p for p in report.points if (p.method, p.pattern) == (method, pattern)), key=lambda p: p.sparsity)
        color = f"C{number % 10}"
        above = " (above)" if all(p.ratio > top for p in own) else ""
        control = method in _CONTROLS
        line = {"linestyle": ":" if control else "-", "linewidth": 1.4} if len(own) > 1 else {"linestyle": "none"}
        labels[method, pattern] = color
        axes.errorbar(
            [100 * p.sparsity for p in own],
            [p.ratio for p in own],
            yerr=[0.0 if p.ratio > top else p.ratio_standard_error or 0.0 for p in own],
            marker="o" if len(own) > 1 else "D",
            markersize=4 if len(own) > 1 else 6,
            capsize=2,
            color=color,
            label=f"{method} {pattern}{above}",
            **line,
        )
    for curve in report.curves:
        ratio = {round(p.sparsity, 6): p.ratio for p in report.points if _same(p, curve)}
        color = labels[curve.method, curve.pattern]
        if curve.tolerance_5 > 0:
            axes.plot(100 * curve.tolerance_5, ratio[curve.tolerance_5], "o", ms=11, mfc="none", mec=color, mew=1.6)
        if curve.shape:
            axes.plot(100 * curve.shape, ratio[curve.shape], "v", ms=9, mfc="none", mec=color, mew=1.6)
    axes.axhline(1.05, color="0.5", linewidth=0.8, linestyle="--")
    axes.annotate("5 %", (1, 1.05), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("sparsity of the decoder linears, %")
    axes.set_ylabel("perplexity / dense")
    axes.set_title(
        f"How far {Path(report.model).name} can be pruned (dense perplexity {report.dense_perplexity:.2f};\n"
        "circle: last point within 5 %, triangle: bend of the curve)",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    temporary = file.with_name(f".{file.name}.tmp")
    # The same file for the same sweep, and its text as text.
    with disk_errors(file), rc_context({"svg.hashsalt": "halfweight", "svg.fonttype": "none"}):
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(temporary, format=file.suffix.removeprefix("."), dpi=150, metadata=metadata)
        commit(temporary, file)


def limits(points: Sequence[SweepPoint]) -> tuple[float, float]:
    """The ratios between which everything but controls lies, with some room; all points where there is nothing else."""
    finite = [point for point in points if math.isfinite(point.ratio)]
    ratios = [p.ratio for p in finite if p.method not in _CONTROLS] or [p.ratio for p in finite]
    return 0.8 * min([1.0, *ratios]), 1.6 * max([1.1, *ratios])


def _same(point: SweepPoint, curve: SweepCurve) -> bool:
    return (point.method, point.pattern) == (curve.method, curve.pattern)
