"""`halfweight eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import human_seconds, out, progress_bars, table, write_json


def evaluate(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or .jsonl file; default: the held-out text that ships."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first N windows; default: all.")] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    sparse_tokens: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of a window's tokens, from its end, that select their inputs."),
    ] = 0.99,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Perplexity of a dense or compressed model over non-overlapping windows of a text.

    Examples:

        halfweight eval smollm2-2of4

        halfweight eval demo --text wikitext2-test.txt --windows 16 --seqlen 1024 --json dense.json
    """
    from ..compress.report import Progress
    from ..eval.perplexity import evaluate as measure
    from ..serving.sources import resolve_model

    with progress_bars() as progress:
        source = resolve_model(
            model,
            trust_remote_code=trust_remote_code,
            report=lambda line: progress(Progress("model", 0, 1, line)),
        )
        result = measure(
            source.path,
            text,
            windows=windows,
            seqlen=seqlen,
            device=device,
            dtype=dtype,
            sparse_tokens=sparse_tokens,
            progress=lambda done, total: progress(Progress("eval", done, total)),
        )
    result = result.model_copy(update={"model": source.name})
    write_json(json, result)
    rows = table(f"perplexity of {result.model}", "", "", left=2)
    spread = "" if result.standard_error is None else f" ± {result.standard_error:.3f} (standard error)"
    rows.add_row("perplexity", f"{result.perplexity:.3f}{spread}")
    rows.add_row("text", f"{result.text}: {result.windows} windows of {result.seqlen}, {result.tokens} tokens scored")
    rows.add_row("first token", "replaced by BOS" if result.bos else "as in the text")
    rows.add_row("computed in", f"{result.dtype} on {result.device}, {human_seconds(result.seconds)}")
    if result.bytes_read_fraction is not None:
        read = f"{result.bytes_read_fraction:.1%} of their bytes, by {result.sparse_tokens:.1%} of the tokens"
        rows.add_row("selecting linears read", read)
    out.print(rows)
