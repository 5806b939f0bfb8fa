"""`halfweight bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..serving.errors import InputError
from . import options
from .output import human_bytes, out, progress_bars, say, table, write_json

if TYPE_CHECKING:
    from ..eval.layer_speed import LayerSpeed
    from ..eval.speed import Speed

_WIDTH = 132  # of the tables


def bench(
    folder: options.Folder,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model; default: the artifact's own weights, expanded."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="B,B", help="Sequences decoded at a time.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Measured turns of every setting.")] = 3,
    dtypes: Annotated[
        str, typer.Option(metavar="T,T", help="Dtypes to try; auto: float32,bfloat16 on a CPU, else the stored one.")
    ] = "auto",
    threads: Annotated[
        str | None, typer.Option(metavar="N,N", help="Thread counts to try on a CPU; verdicts are for the first.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Run nothing; model the linears on a GPU that is not here: a100, 4090 or h100.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the verdicts to DIR/verdicts.json, which loading honours.")
    ] = False,
    json: options.Json = None,
    device: options.Device = "auto",
) -> None:
    """Time prefill and decoding beside the dense model and dense int4, and judge every kind of linear.

    Examples:

        halfweight bench smollm2-2of4 --dense demo --json smollm2-2of4/bench.json

        halfweight bench smollm2-2of4 --batch 1 --new 32 --dtypes float32 --apply

        halfweight bench smollm2-2of4 --gpu h100
    """
    from ..compress.report import Progress
    from ..eval.speed import bench as measure
    from ..serving import verdicts
    from ..serving.sources import resolve_model

    batches = _integers("--batch", batch)
    if gpu is not None:
        if apply:
            raise InputError("--gpu models and --apply keeps only what was measured; run bench on the GPU instead")
        _modelled(folder, gpu, batches, json)
        return
    with progress_bars() as progress:
        source = None if dense is None else resolve_model(dense, report=say)
        result = measure(
            folder,
            None if source is None else source.path,
            batches=batches,
            prompt=prompt,
            new=new,
            rounds=rounds,
            dtypes=tuple(dtypes.split(",")),
            threads=() if threads is None else _integers("--threads", threads),
            device=device,
            progress=lambda done, total: progress(Progress("bench", done, total)),
        )
    if source is not None:
        result = result.model_copy(update={"dense": source.name})
    write_json(json, result)
    show(result)
    if apply:
        from ..eval.layer_speed import entries

        verdicts.write(folder, entries(result.layers, result.device))
        say(f"verdicts written to {folder / verdicts.FILE}; loading on {result.device} honours them")


def show(result: Speed) -> None:
    """The tables of a finished benchmark."""
    title = f"{result.folder} on {result.device}: {result.prompt} tokens of prompt, {result.new} decoded"
    headers = ["batch", "model", "dtype", "threads", "prefill tok/s", "decode tok/s", "low-high", "GB/s", "memory"]
    rows = table(title, *headers, "x dense", "x int4", left=3)
    best: dict[tuple[str, int], float] = {}
    for row in result.models:
        best[row.model, row.batch] = max(best.get((row.model, row.batch), 0.0), row.decode.median)
    for row in result.models:
        rows.add_row(
            str(row.batch),
            row.model,
            row.dtype,
            "-" if row.threads is None else str(row.threads),
            f"{row.prefill.median:.0f}",
            f"{row.decode.median:.1f}",
            f"{row.decode.low:.1f}-{row.decode.high:.1f}",
            f"{row.gigabytes_per_second:.1f}",
            human_bytes(row.memory_bytes),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio_to_dense, row.ratio_to_int4)),
            style="bold" if row.decode.median == best[row.model, row.batch] else None,
        )
    _wide().print(rows)
    say(f"dense: {result.dense}; int4: {result.int4}. Ratios: decoding, over the rival's best setting (bold).")
    if result.unsteady:
        say(result.unsteady)
    kernels = table("what runs the linears", "linears", "N x K (how many)", "dtype", "runs on", "why", left=5)
    alike: dict[tuple[str, ...], list[str]] = {}
    for kernel in result.kernels:
        key = (f"{kernel.pattern} {kernel.numbers}", kernel.dtype, kernel.backend, kernel.reason)
        alike.setdefault(key, []).append(f"{kernel.shape[0]} x {kernel.shape[1]} ({kernel.count})")
    for (what, dtype, backend, reason), shapes in alike.items():
        kernels.add_row(what, ", ".join(shapes), dtype, backend, reason)
    _wide().print(kernels)
    show_layers(result.layers)


def _wide() -> Console:
    """Folded into 80 columns nobody could read the tables."""
    return Console(width=max(out.width, _WIDTH))


def show_layers(layers: list[LayerSpeed]) -> None:
    """One row per kind of linear, dtype and number of tokens, with times in microseconds."""
    evidence = layers[0].evidence if layers else "measured"
    headers = ["linear", "N x K (how many)", "dtype", "tokens", "stored", "int4", "dense"]
    rows = table(f"microseconds per linear, {evidence}, and verdicts", *headers, left=3)
    rows.add_column("verdict")
    rows.add_column("why", overflow="fold")
    for layer in layers:
        n, k = layer.shape
        int4 = "-" if layer.own == "int4" or "int4" not in layer.times else f"{layer.times['int4'].median:.0f}"
        rows.add_row(
            f"{layer.pattern} {layer.numbers}",
            f"{n} x {k} ({layer.count})",
            layer.dtype,
            str(layer.tokens),
            f"{layer.times[layer.own].median:.0f}",
            int4 if layer.int4_exact or int4 == "-" else f"({int4})",
            f"{layer.times['dense'].median:.0f}",
            layer.verdict,
            layer.reason,
        )
    _wide().print(rows)
    if any("int4" in layer.times and not layer.int4_exact for layer in layers):
        say("(int4) in brackets: dense int4 would change these weights, so it is no possible verdict")


def _modelled(folder: Path, gpu: str, batches: tuple[int, ...], json: Path | None) -> None:
    from ..eval.modelled_speed import model_layers
    from ..serving.gguf import cache_root

    result = model_layers(folder, gpu, batches, cache_root() / "kernels")
    write_json(json, result)
    say(f"{result.device}: nothing was run; times are {result.times}, of linears in {result.dtype}")
    show_layers(result.layers)


def _integers(flag: str, value: str) -> tuple[int, ...]:
    """`1,4,16` as positive integers; raises InputError naming the flag."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{flag} {value!r} is not a list of positive numbers such as 1,4,16")
    return tuple(dict.fromkeys(numbers))
