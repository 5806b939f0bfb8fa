"""The page's part about speed, from a result of `halfweight bench`."""

from __future__ import annotations

from collections.abc import Sequence

from ..layer_speed import LayerSpeed
from ..speed import ModelSpeed, Speed
from . import charts
from .parts import Figure, Section, Sources, Table, size

MODELS = ("compressed", "dense", "int4")  # the order of colours


def speed(sources: Sources) -> Section | None:
    """Measured speed beside the rivals, what ran, and the verdicts."""
    found = sources.artifact.speed
    if found is None:
        return None
    best = best_settings(found)
    batches = sorted({row.batch for row in found.models})
    names = [name for name in MODELS if any(row.model == name for row in found.models)]
    groups = [f"batch {batch}" for batch in batches]
    figures = []
    for title, rate in (("decode", "decoding"), ("prefill", "prefill")):
        values = {
            (i, j): (best[name, batch].decode if title == "decode" else best[name, batch].prefill).median
            for i, batch in enumerate(batches)
            for j, name in enumerate(names)
            if (name, batch) in best
        }
        svg = charts.bars(groups, names, values, f"{rate}, tokens/s")
        figures.append(Figure(svg, f"Measured on {found.device}, each model in the setting where it decodes fastest."))
    text = [
        f"Dense: {found.dense}. Int4: {found.int4}. {found.prompt} tokens of prompt, {found.new} decoded, medians of"
        f" {found.rounds} rounds in which all settings took turns."
    ]
    if found.unsteady:
        text.append(found.unsteady)
    return Section(
        "Speed",
        text,
        figures,
        [_model_table(found, best), _kernel_table(found), _verdict_table(found.layers)],
    )


def best_settings(found: Speed) -> dict[tuple[str, int], ModelSpeed]:
    """The setting in which each model decodes fastest, by model and batch size."""
    best: dict[tuple[str, int], ModelSpeed] = {}
    for row in found.models:
        known = best.get((row.model, row.batch))
        if known is None or row.decode.median > known.decode.median:
            best[row.model, row.batch] = row
    return best


def smallest_batch(found: Speed | None) -> ModelSpeed | None:
    """The artifact's fastest setting at the smallest batch, where it was measured."""
    if found is None:
        return None
    rows = [row for row in best_settings(found).values() if row.model == MODELS[0]]
    return min(rows, key=lambda row: row.batch, default=None)


def _model_table(found: Speed, best: dict[tuple[str, int], ModelSpeed]) -> Table:
    rows = []
    for row in found.models:
        fastest = best[row.model, row.batch] is row
        rows.append(
            [
                row.model + (" (fastest)" if fastest else ""),
                row.dtype + ("" if row.threads is None else f", threads: {row.threads}"),
                str(row.batch),
                f"{row.prefill.median:.0f}",
                f"{row.decode.median:.1f} ({row.decode.low:.1f}-{row.decode.high:.1f})",
                f"{row.gigabytes_per_second:.1f}",
                size(row.memory_bytes),
                "-" if row.ratio_to_dense is None else f"{row.ratio_to_dense:.2f}",
                "-" if row.ratio_to_int4 is None else f"{row.ratio_to_int4:.2f}",
            ]
        )
    headers = (
        "model",
        "setting",
        "batch",
        "prefill tok/s",
        "decode tok/s (low-high)",
        "GB/s",
        "memory",
        "x dense",
        "x int4",
    )
    return Table("Models", headers, rows, left=2)


def _kernel_table(found: Speed) -> Table:
    rows = [
        [
            f"{kernel.pattern} {kernel.numbers}",
            f"{kernel.shape[0]} x {kernel.shape[1]}",
            str(kernel.count),
            kernel.dtype,
            kernel.backend,
            kernel.reason,
        ]
        for kernel in found.kernels
    ]
    headers = ("linear", "N x K", "count", "dtype", "runs on", "why")
    return Table("What runs the linears", headers, rows, left=6, folded=True)


def _verdict_table(found: Sequence[LayerSpeed]) -> Table:
    rows = []
    for layer in found:
        int4 = layer.times.get("int4")
        shown = "-" if int4 is None or layer.own == "int4" else f"{int4.median:.0f}"
        rows.append(
            [
                f"{layer.pattern} {layer.numbers}",
                f"{layer.shape[0]} x {layer.shape[1]} ({layer.count})",
                layer.dtype,
                layer.verdict,
                f"{layer.reason} [{layer.evidence}]",
                str(layer.tokens),
                f"{layer.times[layer.own].median:.0f}",
                shown if layer.int4_exact or shown == "-" else f"({shown})",
                f"{layer.times['dense'].median:.0f}",
            ]
        )
    headers = ("linear", "N x K (count)", "dtype", "verdict", "why", "tokens", "stored us", "int4 us", "dense us")
    return Table("Verdict on every kind of linear", headers, rows, left=5, folded=True)
