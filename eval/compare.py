"""Compressed models beside the dense one: one table of quality, size and speed, with errors and paired tests."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..serving.checkpoint import Checkpoint
from ..serving.errors import InputError
from ..serving.inspect import inspect_checkpoint
from ..serving.load import load, load_tokenizer, resolve_device, resolve_dtype, stored_dtype
from ..serving.skeleton import load_config
from ..serving.warmup import warmup
from .agreement import Reference, TextScores, generate, join, reference, score_window, shared_tokens
from .fit import require_fit
from .perplexity import check_context, decode, summarize
from .resume import Kept, identity_of
from .selection import dense_tokens_of, require_scored_apart, selecting_tokens
from .significance import Difference, mean_and_error, paired_difference
from .task_results import TaskResult, document_scores
from .tasks import evaluate_tasks
from .text import bos_token, builtin_text, exact_windows, read_text, tokenize
from .timing import Spread, generation_seconds

SPEED_PROMPT, SPEED_ROUNDS = 128, 3


class Against(BaseModel):
    """A compressed model against the dense one on the same text.

    `perplexity_ratio` with the paired `ratio_standard_error` (of the windows' loss differences, delta method: far
    smaller than the two perplexities' own errors suggest); `kl` = mean KL(dense || compressed) per token in nats, with
    its standard error over windows; `token_agreement` = share of tokens with the same most likely next token;
    `generation_agreement` = mean share of the greedy tokens before the two generations part, `same_generations` the
    share of prompts where they never do; `differences` of tasks. `prefill_ratio` and `decode_ratio` are of median
    rates, both models' in turns; None where speed was not measured.
    """

    perplexity_ratio: float
    ratio_standard_error: float | None
    kl: float
    kl_standard_error: float | None
    token_agreement: float
    generation_agreement: float
    same_generations: float
    differences: list[Difference]
    prefill_ratio: float | None = None
    decode_ratio: float | None = None


class ModelRow(BaseModel):
    """One model of a comparison. `bytes` are of its weight files, `load_seconds` of this process's load, files likely
    cached; `calibration_error` is the expected calibration error of the next token; bits as in `inspect_checkpoint`.
    `prefill` and `decode` are in tokens per second; None where speed was not measured."""

    name: str
    path: str
    effective_bits: float
    effective_bits_model: float
    bytes: int
    load_seconds: float
    perplexity: float
    standard_error: float | None
    calibration_error: float
    tasks: list[TaskResult]
    against_dense: Against | None
    prefill: Spread | None = None
    decode: Spread | None = None


class Comparison(BaseModel):
    """Result of `compare`; the first of `models` is the dense one. Perplexity is of `windows` windows of `seqlen` of
    `text`; generations continue the first `prompt_tokens` of `prompts` of them by `new_tokens` greedy tokens. Speed is
    of the first `speed_prompt` tokens of the text (0: not measured) and of `new_tokens` after them, one sequence."""

    models: list[ModelRow]
    text: str
    windows: int
    seqlen: int
    tokens: int
    bos: bool
    prompts: int
    prompt_tokens: int
    new_tokens: int
    speed_prompt: int
    limit: float | None
    num_fewshot: int | None
    dtype: str
    device: str
    versions: dict[str, str]
    seconds: float


class _Scored(BaseModel):
    """What is kept of a model that is scored: its row, losses per window (nats) and generated tokens per prompt."""

    row: ModelRow
    losses: list[list[float]]
    generated: list[list[int]]


def compare(
    dense: str | Path,
    models: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    windows: int | None = None,
    seqlen: int = 1024,
    prompts: int = 8,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    speed: bool = True,
    tasks: Sequence[str] = (),
    out: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str = "auto",
    dtype: str = "auto",
    resume: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare checkpoint folders `models` with the `dense` one they come from, on `text` (default: the shipped held-out
    text) and on `tasks`, whose results go to `out`/MODEL and are not computed twice; with `speed`, time them too.

    Two models are in memory at a time. `resume` is a file that keeps the models that are scored, until the caller
    deletes it: with the same models, text and settings they are not scored again. `progress(what, done, total)` is
    called as windows are scored. Raises InputError for bad folders, models of another vocabulary or tokenizer, and
    models that do not fit in memory together.
    """
    begin = time.monotonic()
    if tasks and out is None:
        raise InputError("tasks need a folder for their results; give --out DIR")
    names = row_names([dense, *models])
    paths = [Path(dense), *map(Path, models)]
    for path in paths:
        require_scored_apart(Checkpoint(path).artifact, path)
    chosen, bos = _windows(paths, names, text, seqlen, windows)
    if prompt_tokens + new_tokens > seqlen:
        raise InputError(f"{prompt_tokens} + {new_tokens} tokens of a generation exceed --seqlen {seqlen}")
    for path in paths[1:]:
        require_fit([dense, path], device, dtype)
    show = progress or (lambda what, done, total: None)

    where = resolve_device(device)
    computed = resolve_dtype(dtype, where, stored_dtype(Checkpoint(dense)))
    settings = f"{prompts} {prompt_tokens} {new_tokens} {computed} {where}"
    kept = Kept(resume, identity_of(paths, chosen, settings))
    scored = [_Scored(**line) for line in kept.lines]
    base: Reference | None = None
    for name, path in list(zip(names, paths, strict=True))[len(scored) :]:
        model, seconds = _timed_load(path, device, dtype)
        if base is None:
            base = reference(load(dense, device, dtype) if scored else model, chosen)
        scores = _score(model, chosen, base, partial(show, name))
        generated = generate(model, chosen[:prompts], prompt_tokens, new_tokens)
        against = _against(scores, generated, scored[0]) if scored else None
        losses = [window.tolist() for window in scores.losses]
        scored.append(_Scored(row=_row(name, path, seconds, scores, against), losses=losses, generated=generated))
        kept.add(scored[-1].model_dump())
        del model
        gc.collect()  # modules refer to themselves; the next model needs the memory
    del base

    rows = [one.row for one in scored]
    speed_prompt = min(SPEED_PROMPT, seqlen - new_tokens) if speed else 0
    if speed:
        _add_speed(rows, paths, chosen[0][:speed_prompt], new_tokens, device, dtype, show)
    if tasks and out is not None:
        _add_tasks(rows, paths, tasks, Path(out), limit, num_fewshot, batch_size, device, dtype)
    return Comparison(
        models=rows,
        text="builtin" if text is None else str(text),
        windows=len(chosen),
        seqlen=seqlen,
        tokens=len(chosen) * (seqlen - 1),
        bos=bos is not None,
        prompts=min(prompts, len(chosen)),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        speed_prompt=speed_prompt,
        limit=limit,
        num_fewshot=num_fewshot,
        dtype=str(computed).removeprefix("torch."),
        device=str(where),
        versions={name: version(name) for name in ("torch", "transformers")},
        seconds=time.monotonic() - begin,
    )


def row_names(models: Sequence[str | Path]) -> list[str]:
    """A short name per model: its folder's, with a number where that is taken."""
    names: list[str] = []
    for model in models:
        stem = Path(model).resolve().name
        taken = sum(name == stem or name.startswith(f"{stem}-") for name in names)
        names.append(f"{stem}-{taken + 1}" if stem in names else stem)
    return names


def _windows(
    paths: Sequence[Path], names: Sequence[str], text: str | Path | None, seqlen: int, count: int | None
) -> tuple[list[Tensor], int | None]:
    """The dense model's token windows, and its BOS; raises InputError when another model reads other tokens."""
    source = builtin_text("heldout") if text is None else read_text(text)
    tokens: Tensor | None = None
    vocabulary = None
    for path, name in zip(paths, names, strict=True):
        config = load_config(Checkpoint(path))
        check_context(config, seqlen)
        tokenizer, size = load_tokenizer(path), config.get_text_config().vocab_size
        found = tokenize(tokenizer, source)
        if tokens is None:
            tokens, vocabulary, bos = found, size, bos_token(tokenizer)
        elif size != vocabulary or not torch.equal(found, tokens):
            raise InputError(f"{name}: another vocabulary or tokenizer than {names[0]}; compare models of one family")
    assert tokens is not None
    return exact_windows(tokens, seqlen, bos, count), bos


def _timed_load(path: Path, device: str, dtype: str) -> tuple[Any, float]:
    begin = time.monotonic()
    model = load(path, device, dtype)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return model, time.monotonic() - begin


def _score(model: Any, windows: Sequence[Tensor], base: Reference, show: Callable[[int, int], None]) -> TextScores:
    """Scores of all windows, against the dense model unless `model` is that; `show(done, total)` after each."""
    parts = []
    with selecting_tokens(model, dense_tokens_of(len(windows[0]))):
        for number, (window, dense) in enumerate(zip(windows, base.outputs, strict=True)):
            if model is base.model:
                parts.append(score_window(model, window, dense, None))
            else:
                parts.append(score_window(model, window, decode(model, window), (base.model, dense)))
            show(number + 1, len(windows))
    return join(parts)


def _against(scores: TextScores, generated: Sequence[Sequence[int]], dense: _Scored) -> Against:
    paired = [float((a - torch.tensor(b)).mean()) for a, b in zip(scores.losses, dense.losses, strict=True)]
    shared, new = shared_tokens(dense.generated, generated), len(generated[0])
    log_ratio, log_error = mean_and_error(paired)
    kl, kl_error = mean_and_error([float(window.mean()) for window in scores.divergence])
    ratio = math.exp(log_ratio)
    return Against(
        perplexity_ratio=ratio,
        ratio_standard_error=None if log_error is None else ratio * log_error,
        kl=kl,
        kl_standard_error=kl_error,
        token_agreement=float(torch.cat(scores.agreement).float().mean()),
        generation_agreement=sum(shared) / (new * len(shared)),
        same_generations=sum(count == new for count in shared) / len(shared),
        differences=[],
    )


def _row(name: str, path: Path, seconds: float, scores: TextScores, against: Against | None) -> ModelRow:
    inspection = inspect_checkpoint(path)
    perplexity, standard_error = summarize(scores.losses)
    return ModelRow(
        name=name,
        path=str(path),
        effective_bits=inspection.effective_bits,
        effective_bits_model=inspection.effective_bits_model,
        bytes=sum(file.stat().st_size for file in {info.file for info in Checkpoint(path).tensors.values()}),
        load_seconds=seconds,
        perplexity=perplexity,
        standard_error=standard_error,
        calibration_error=scores.calibration_error(),
        tasks=[],
        against_dense=against,
    )


def _add_speed(
    rows: Sequence[ModelRow],
    paths: Sequence[Path],
    prompt: Tensor,
    new: int,
    device: str,
    dtype: str,
    show: Callable[[str, int, int], None],
) -> None:
    """Time the dense model and each other in turns, as served, and put rates and ratios into `rows`."""
    dense = _warm_load(paths[0], device, dtype)
    ids = prompt[None].to(dense.device)
    dense_times: list[tuple[float, float]] = []
    for number, (row, path) in enumerate(zip(rows[1:], paths[1:], strict=True)):
        pair = (dense, _warm_load(path, device, dtype))
        for model in pair:
            generation_seconds(model, ids, min(new, 4))  # the first run allocates and may compile
        turns = [[generation_seconds(model, ids, new) for model in pair] for _ in range(SPEED_ROUNDS)]
        beside, times = zip(*turns, strict=True)
        dense_times += beside
        row.prefill, row.decode = _rates(times, len(prompt), new)
        against = _rates(beside, len(prompt), new)
        assert row.against_dense is not None
        row.against_dense.prefill_ratio = row.prefill.median / against[0].median
        row.against_dense.decode_ratio = row.decode.median / against[1].median
        show("speed", number + 1, len(rows) - 1)
        del pair
        gc.collect()
    rows[0].prefill, rows[0].decode = _rates(dense_times, len(prompt), new)


def _warm_load(path: Path, device: str, dtype: str) -> Any:
    """The model with its kernels chosen for the prompt and one sequence."""
    model = load(path, device, dtype)
    warmup(model, (1, SPEED_PROMPT), model.dtype)
    return model


def _rates(times: Sequence[tuple[float, float]], prompt: int, new: int) -> tuple[Spread, Spread]:
    """Tokens per second of prefill and of decoding, of (seconds, seconds)."""
    return Spread.of([prompt / seconds for seconds, _ in times]), Spread.of([new / seconds for _, seconds in times])


def _add_tasks(
    rows: Sequence[ModelRow],
    paths: Sequence[Path],
    tasks: Sequence[str],
    out: Path,
    limit: float | None,
    num_fewshot: int | None,
    batch_size: int | str,
    device: str,
    dtype: str,
) -> None:
    """Run `tasks` on every model, and put results and paired differences into `rows`."""
    for row, path in zip(rows, paths, strict=True):
        report = evaluate_tasks(
            path,
            tasks,
            out / row.name,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        row.tasks = report.tasks
        if row.against_dense is not None:
            row.against_dense.differences = task_differences(rows[0].tasks, out / rows[0].name, out / row.name)


def task_differences(tasks: Sequence[TaskResult], dense: Path, other: Path) -> list[Difference]:
    """Paired differences of every metric that scores documents, from two folders of lm-eval's results."""
    found = []
    for task in tasks:
        ours = document_scores(other / task.file, task.task)
        for metric, scores in document_scores(dense / task.file, task.task).items():
            if metric in ours and any(metric == known.name for known in task.metrics):
                found.append(paired_difference(task.task, metric, scores, ours[metric]))
    return found
