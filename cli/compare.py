"""`halfweight compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import human_bytes, human_seconds, out, partial_of, progress_bars, table, write_json

if TYPE_CHECKING:
    from ..eval.compare import Comparison, ModelRow
    from ..eval.timing import Spread


def compare(
    dense: Annotated[str, typer.Argument(help="The dense model: a folder, a hub id, a GGUF file, or [bold]demo[/].")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Compressed checkpoint folders.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text or .jsonl file; default: the held-out text that ships.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first N windows; default: all.")] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Greedy tokens per prompt, for generation agreement and speed.")
    ] = 32,
    speed: Annotated[
        bool, typer.Option(help="Time prefill and decoding, each model in turn with the dense one.")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks or YAML files; kept in --out.")
    ] = None,
    results: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for task results; finished ones are not run again.")
    ] = Path("compare-tasks"),
    limit: Annotated[float | None, typer.Option(min=0, help="Documents per task; below 1: a fraction.")] = None,
    batch_size: Annotated[str, typer.Option(metavar="B", help="Requests at once in tasks, or auto.")] = "1",
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before each task question.")] = None,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compressed models beside their dense original: perplexity, tasks, agreement, bits, size and speed.

    Finished tasks are kept, and with --json FILE the other scores of finished models, in FILE.partial; the same command
    goes on with the others.

    Examples:

        halfweight compare demo smollm2-2of4 smollm2-w4

        halfweight compare demo smollm2-2of4 --tasks piqa,lambada_openai --limit 500 --json compare.json
    """
    from ..compress.report import Progress
    from ..eval.compare import compare as measure
    from ..serving.sources import resolve_model

    with progress_bars() as progress:
        source = resolve_model(
            dense,
            trust_remote_code=trust_remote_code,
            report=lambda line: progress(Progress("model", 0, 1, line)),
        )
        result = measure(
            source.path,
            folders,
            text=text,
            windows=windows,
            seqlen=seqlen,
            new_tokens=new_tokens,
            speed=speed,
            tasks=() if tasks is None else options.names(tasks, "--tasks"),
            out=results,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=options.batch_size(batch_size),
            device=device,
            dtype=dtype,
            resume=partial_of(json),
            progress=lambda name, done, total: progress(Progress(name, done, total)),
        )
    write_json(json, result, partial_of(json))
    show(result, source.name)


def show(result: Comparison, dense: str) -> None:
    """The tables of a comparison, one column per model, and how it was made."""
    rows = table("compared with the dense model", "", dense, *(row.name for row in result.models[1:]))
    for title, cell in _LINES:
        rows.add_row(title, *(cell(row) for row in result.models))
    for place, task in enumerate(result.models[0].tasks):
        for number, metric in enumerate(task.metrics):
            cells = [row.tasks[place].metrics[number] for row in result.models]
            rows.add_row(
                f"{task.task} {metric.name}", *(_plus_minus(cell.value, cell.standard_error, 4) for cell in cells)
            )
    out.print(rows)
    if any(row.against_dense is not None and row.against_dense.differences for row in result.models):
        _show_differences(result)
    bos = ", first token replaced by BOS" if result.bos else ""
    timed = (
        f"; speed: {result.speed_prompt} tokens, {result.new_tokens} new, the median of {result.models[1].decode.count}"
        if result.models[1].decode is not None
        else ""
    )
    out.print(
        f"{result.text}: {result.windows} windows of {result.seqlen}{bos}; generations: {result.prompts} prompts of"
        f" {result.prompt_tokens} tokens, {result.new_tokens} new{timed}; {result.dtype} on {result.device},"
        f" {human_seconds(result.seconds)}"
    )


def _show_differences(result: Comparison) -> None:
    rows = table(
        "paired differences to the dense model", "model", "task", "difference", "p", "better", "worse", "test", left=2
    )
    for row in result.models[1:]:
        for difference in row.against_dense.differences if row.against_dense is not None else ():
            rows.add_row(
                row.name,
                f"{difference.task} {difference.metric}",
                _plus_minus(difference.difference, difference.standard_error, 4, sign="+"),
                "< 0.001" if difference.p_value < 0.001 else f"{difference.p_value:.3f}",
                str(difference.better),
                str(difference.worse),
                difference.test,
            )
    out.print(rows)
    out.print("p: two-sided, not corrected for the number of comparisons")


def _plus_minus(value: float, error: float | None, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _ratio(row: ModelRow) -> str:
    against = row.against_dense
    return "1" if against is None else _plus_minus(against.perplexity_ratio, against.ratio_standard_error, 4)


def _kl(row: ModelRow) -> str:
    against = row.against_dense
    return "0" if against is None else _plus_minus(against.kl, against.kl_standard_error, 4)


def _agreement(row: ModelRow) -> str:
    return "-" if row.against_dense is None else f"{100 * row.against_dense.token_agreement:.1f} %"


def _generations(row: ModelRow) -> str:
    against = row.against_dense
    if against is None:
        return "-"
    return f"{100 * against.generation_agreement:.1f} % ({100 * against.same_generations:.0f} % of prompts whole)"


def _speed(rate: Spread | None, ratio: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate.median:.1f}" + ("" if ratio is None else f" ({ratio:.2f} x dense)")


def _prefill(row: ModelRow) -> str:
    return _speed(row.prefill, None if row.against_dense is None else row.against_dense.prefill_ratio)


def _decode(row: ModelRow) -> str:
    return _speed(row.decode, None if row.against_dense is None else row.against_dense.decode_ratio)


_LINES: tuple[tuple[str, Callable[[ModelRow], str]], ...] = (
    ("perplexity", lambda row: _plus_minus(row.perplexity, row.standard_error, 3)),
    ("ratio to dense, paired", _ratio),
    ("KL to dense, nats per token", _kl),
    ("same next token", _agreement),
    ("same greedy tokens", _generations),
    ("calibration error (ECE)", lambda row: f"{row.calibration_error:.4f}"),
    ("effective bits, linears", lambda row: f"{row.effective_bits:.3f}"),
    ("effective bits, model", lambda row: f"{row.effective_bits_model:.3f}"),
    ("size on disk", lambda row: human_bytes(row.bytes)),
    ("load time", lambda row: f"{row.load_seconds:.1f} s"),
    ("prefill, tokens per second", _prefill),
    ("decode, tokens per second", _decode),
)
