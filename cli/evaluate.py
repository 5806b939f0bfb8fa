"""`halfweight eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import human_seconds, out, partial_of, progress_bars, say, table, write_json

if TYPE_CHECKING:
    from ..compress.report import OnProgress
    from ..eval.activation import ActivationProfile
    from ..eval.perplexity import Perplexity
    from ..eval.task_results import TaskReport
    from ..serving.sources import ModelSource


def evaluate(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or .jsonl file; default: the held-out text that ships."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first N windows; default: all.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens per window; default: 1024.")] = None,
    sparse_tokens: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a window's tokens, from its end, that select their inputs."),
    ] = 0.99,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens at the start of a window that read all inputs and are not scored, in place of --sparse-tokens;"
            " default: none, or a quarter where a prompt chooses the inputs.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks, or YAML files of your own, not perplexity.")
    ] = None,
    limit: Annotated[float | None, typer.Option(min=0, help="Documents per task; below 1: a fraction.")] = None,
    batch_size: Annotated[str, typer.Option(metavar="B", help="Requests at once in tasks, or auto.")] = "1",
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before each task question.")] = None,
    activations: Annotated[
        float | None,
        typer.Option(metavar="P", min=0, help="Share of FFN neurons that P % more perplexity needs, not perplexity."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where task results are kept; default: NAME-tasks.")
    ] = None,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Perplexity of a dense or compressed model over non-overlapping windows of a text; or its scores on tasks, or its
    activation sparsity.

    Finished tasks are kept, and with --json FILE windows, in FILE.partial; the same command goes on with the others.

    Examples:

        halfweight eval smollm2-2of4

        halfweight eval demo --text wikitext2-test.txt --windows 16 --seqlen 1024 --json dense.json

        halfweight eval smollm2-2of4 --tasks piqa,lambada_openai --batch-size 8 --limit 200

        halfweight eval smollm2-2of4 --activations 1

        accelerate launch -m halfweight eval smollm2-2of4 --tasks mmlu --num-fewshot 5
    """
    from ..compress.report import Progress
    from ..eval.perplexity import evaluate as measure
    from ..serving.errors import InputError
    from ..serving.sources import resolve_model

    if (tasks, activations) != (None, None) and (text, windows, seqlen, prompt_tokens) != (None, None, None, None):
        raise InputError(
            "--tasks or --activations with --text, --windows, --seqlen or --prompt-tokens, not both; run them one by"
            " one"
        )
    if tasks is not None and activations is not None:
        raise InputError("--tasks and --activations, not both; run them one by one")
    with progress_bars() as progress:
        source = resolve_model(
            model,
            trust_remote_code=trust_remote_code,
            report=lambda line: progress(Progress("model", 0, 1, line)),
        )
        if tasks is None and activations is None:
            measured = measure(
                source.path,
                text,
                windows=windows,
                seqlen=seqlen or 1024,
                device=device,
                dtype=dtype,
                sparse_tokens=sparse_tokens,
                prompt_tokens=prompt_tokens,
                resume=partial_of(json),
                progress=lambda done, total: progress(Progress("eval", done, total)),
            )
        if activations is not None:
            profile = _profile(source.path, activations, device, dtype, progress)
    if activations is not None:
        write_json(json, profile)
        show_activations(profile, source.name)
    elif tasks is None:
        measured = measured.model_copy(update={"model": source.name})
        write_json(json, measured, partial_of(json))
        show_perplexity(measured)
    else:
        _tasks(source, tasks, results, limit, num_fewshot, batch_size, json, device, dtype)


def _profile(path: Path, percent: float, device: str, dtype: str, progress: OnProgress) -> ActivationProfile:
    """The activation profile: thresholds from calibration windows of the shipped text, perplexity of its dev set."""
    from ..compress.calibration import load_windows
    from ..compress.recipe import Calibration
    from ..compress.report import Progress
    from ..eval.activation import activation_profile
    from ..eval.fit import require_fit
    from ..serving.load import load, load_tokenizer

    windows = load_windows(Calibration(samples=64, seqlen=512), load_tokenizer(path), path)
    require_fit([path], device, dtype)
    return activation_profile(
        load(path, device, dtype),
        windows.calibration[:4],
        windows.dev,
        percent,
        progress=lambda done, total: progress(Progress("eval", done, total)),
    )


def _tasks(
    source: ModelSource,
    tasks: str,
    results: Path | None,
    limit: float | None,
    num_fewshot: int | None,
    batch_size: str,
    json: Path | None,
    device: str,
    dtype: str,
) -> None:
    from ..eval.tasks import evaluate_tasks

    report = evaluate_tasks(
        source.path,
        options.names(tasks, "--tasks"),
        results or Path(f"{Path(source.name).name}-tasks"),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=options.batch_size(batch_size),
        device=device,
        dtype=dtype,
        progress=lambda done, total, task: say(f"task {done + 1} of {total}: {task}") if task else None,
    )
    if report.tasks:  # under `accelerate launch`, the first process alone has them
        write_json(json, report)
        show_tasks(report)


def show_perplexity(result: Perplexity) -> None:
    """The table of a perplexity."""
    rows = table(f"perplexity of {result.model}", "", "", left=2)
    spread = "" if result.standard_error is None else f" ± {result.standard_error:.3f} (standard error)"
    rows.add_row("perplexity", f"{result.perplexity:.3f}{spread}")
    rows.add_row("text", f"{result.text}: {result.windows} windows of {result.seqlen}, {result.tokens} tokens scored")
    rows.add_row("first token", "replaced by BOS" if result.bos else "as in the text")
    rows.add_row("computed in", f"{result.dtype} on {result.device}, {human_seconds(result.seconds)}")
    if result.prompt_tokens is not None:
        rows.add_row("prompt", f"the first {result.prompt_tokens} tokens of a window, read in full and not scored")
    if result.bytes_read_fraction is not None:
        read = f"{result.bytes_read_fraction:.1%} of their bytes, by {result.sparse_tokens:.1%} of the tokens"
        rows.add_row("selecting linears read", read)
    out.print(rows)


def show_tasks(report: TaskReport) -> None:
    """The table of task results, with how they were computed below."""
    rows = table(f"tasks of {report.model}", "task", "metric", "value", "± s.e.", "ECE", "documents", "shots", left=2)
    for result in report.tasks:
        for place, metric in enumerate(result.metrics):
            calibration = result.calibration if place == 0 else None
            rows.add_row(
                result.task if place == 0 else "",
                metric.name,
                f"{metric.value:.4f}",
                "-" if metric.standard_error is None else f"{metric.standard_error:.4f}",
                "" if calibration is None else f"{calibration.error:.3f}",
                f"{result.documents} of {result.available}",
                str(result.shots),
            )
    out.print(rows)
    resumed = f"; {len(report.resumed)} finished earlier" if report.resumed else ""
    out.print(f"lm-eval {report.lm_eval}, {report.dtype} on {report.device}, {human_seconds(report.seconds)}{resumed}")


def show_activations(profile: ActivationProfile, model: str) -> None:
    """The table of an activation profile."""
    rows = table(f"active FFN neurons of {model}", "FFN", "non-zero", f"active at +{profile.percent:g} %", left=1)
    for layer in profile.layers:
        rows.add_row(layer.name, f"{100 * layer.non_zero:.1f} %", f"{100 * layer.active:.1f} %")
    out.print(rows)
    out.print(
        f"{100 * profile.active:.1f} % of the neurons at CETT {profile.cett:.4f}: perplexity {profile.perplexity:.3f}"
        f" -> {profile.sparse_perplexity:.3f} ({profile.tokens} tokens of the dev set)"
    )
