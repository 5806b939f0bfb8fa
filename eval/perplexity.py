"""Perplexity over non-overlapping windows, with logits computed a few tokens at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..serving.checkpoint import Checkpoint
from ..serving.errors import InputError
from ..serving.load import load, load_tokenizer
from ..serving.skeleton import context_length, load_config, logit_chunk
from .resume import Kept, ScoredWindows, identity_of
from .selection import SPARSE_TOKENS, dense_tokens_of, prompt_tokens_of, selecting_tokens
from .text import bos_token, builtin_text, exact_windows, read_text, tokenize


class Perplexity(BaseModel):
    """Result of `evaluate`. `tokens` were scored: each of `windows` windows of `seqlen` scores all but its first.

    `bos` says whether the first token of every window was replaced by BOS; `standard_error` is of the perplexity, from
    the spread of the windows' mean losses (None for one window); `seconds` excludes loading,
    and windows that were scored before. Where linears select their
    inputs, the last share `sparse_tokens` of a window's tokens do, and read `bytes_read_fraction` (see `Reading`) of
    those linears each, which is `bits_read` per weight; all three are None for other models. `prompt_tokens` at the
    start of every window, if any, read every input and were not scored.
    """

    model: str
    text: str
    perplexity: float
    standard_error: float | None
    tokens: int
    seqlen: int
    windows: int
    bos: bool
    dtype: str
    device: str
    seconds: float
    sparse_tokens: float | None = None
    bytes_read_fraction: float | None = None
    bits_read: float | None = None
    prompt_tokens: int | None = None


def summarize(losses: list[Tensor]) -> tuple[float, float | None]:
    """Perplexity `exp(mean loss)` and its standard error (delta method) from per-window token losses in nats."""
    mean = float(torch.cat(losses).double().mean())
    if len(losses) < 2:
        return math.exp(mean), None
    means = torch.stack([loss.double().mean() for loss in losses])
    return math.exp(mean), math.exp(mean) * float(means.std()) / math.sqrt(len(losses))


def window_losses(model: Any, window: Tensor) -> Tensor:
    """Next-token cross entropy `[T - 1]` (nats, fp32) of `model` on token ids `window` `[T]`."""
    losses: list[Tensor] = []
    targets, done = window[1:].to(model.device), 0
    for logits in logit_chunks(model, window, decode(model, window)):
        losses.append(torch.nn.functional.cross_entropy(logits, targets[done : done + len(logits)], reduction="none"))
        done += len(logits)
    return torch.cat(losses)


@torch.no_grad()
def decode(model: Any, window: Tensor) -> Any:
    """The decoder's own output object for token ids `window` `[T]`, without the head."""
    return model.get_decoder()(input_ids=window.to(model.device)[None], use_cache=False)


@torch.no_grad()
def logit_chunks(model: Any, window: Tensor, output: Any) -> Iterator[Tensor]:
    """Logits `[n, V]`, fp32, at all positions of `window` `[T]` but the last, some at a time (see `logit_chunk`).

    The decoder has run already: `output` is its `decode`; the model's own head code runs here.
    """
    chunk, decoder = logit_chunk(model.config), model.get_decoder()
    ids = window.to(model.device)[None]
    for start in range(0, len(window) - 1, chunk):
        keep = torch.arange(start, min(start + chunk, len(window) - 1), device=ids.device)
        with decoder_returns(decoder, output):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
        yield logits.float()


@contextmanager
def decoder_returns(decoder: Any, output: Any) -> Any:
    """Within the `with`, calling `decoder` gives `output`: the model's own head code then runs on cached states."""
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del decoder.forward


def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    *,
    windows: int | None = None,
    seqlen: int = 1024,
    device: str = "auto",
    dtype: str = "auto",
    sparse_tokens: float = SPARSE_TOKENS,
    prompt_tokens: int | None = None,
    resume: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a checkpoint folder, dense or compressed, on `text` (a file; default: the shipped held-out text).

    The text is tokenized once and cut into non-overlapping windows of `seqlen` tokens, of which the first `windows`
    (default: all) are scored; for tokenizers that add BOS, a window's first token is replaced by it. In linears that
    select their inputs, all but the last share `sparse_tokens` of a window's tokens read every input. With
    `prompt_tokens`, in place of that, a window begins with a prompt of so many tokens, which read every input and are
    not scored; where a prompt chooses the inputs, that is a quarter of the window by default. `resume` is a file that
    keeps the windows that are scored, until the caller deletes it: those of the same model, text and settings that are
    in it are not scored again. `progress(done, total)` is called after each window. Raises InputError for a bad folder,
    text, device, dtype or length of the prompt.
    """

    tokenizer = load_tokenizer(model)
    tokens = tokenize(tokenizer, builtin_text("heldout") if text is None else read_text(text))
    bos = bos_token(tokenizer)
    chosen = exact_windows(tokens, seqlen, bos, windows)
    checkpoint = Checkpoint(model)
    check_context(load_config(checkpoint), seqlen)
    if prompt_tokens is None and checkpoint.artifact is not None and checkpoint.artifact.prompt_static:
        prompt_tokens = prompt_tokens_of(seqlen)
    if prompt_tokens is not None and not 1 <= prompt_tokens <= seqlen - 2:
        raise InputError(f"--prompt-tokens {prompt_tokens}: windows of {seqlen} tokens allow 1 to {seqlen - 2}")
    network = load(model, device, dtype)
    begin = time.monotonic()
    dense_tokens = dense_tokens_of(seqlen, sparse_tokens) if prompt_tokens is None else prompt_tokens
    with selecting_tokens(network, dense_tokens) as reading:
        settings = f"{dense_tokens} {prompt_tokens} {network.dtype} {network.device}"
        scored = ScoredWindows(Kept(resume, identity_of([model], chosen, settings)), reading)
        for index, window in enumerate(chosen):
            if index >= len(scored.losses):
                scored.add(window_losses(network, window)[prompt_tokens or 0 :].cpu(), reading)
            if progress is not None:
                progress(index + 1, len(chosen))
    losses = scored.losses
    perplexity, standard_error = summarize(losses)
    return Perplexity(
        model=str(model),
        text="builtin" if text is None else str(text),
        perplexity=perplexity,
        standard_error=standard_error,
        tokens=sum(len(loss) for loss in losses),
        seqlen=seqlen,
        windows=len(chosen),
        bos=bos is not None,
        dtype=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
        seconds=time.monotonic() - begin,
        sparse_tokens=None if reading.fraction is None else 1 - dense_tokens / seqlen,
        bytes_read_fraction=reading.fraction,
        bits_read=reading.bits,
        prompt_tokens=prompt_tokens,
    )


def check_context(config: Any, seqlen: int) -> None:
    """Raise InputError when windows of `seqlen` tokens do not fit the model's context."""
    context = context_length(config)
    if context is not None and seqlen > context:
        raise InputError(
            f"--seqlen {seqlen} is longer than the model's context of {context} tokens; use at most {context}"
        )
