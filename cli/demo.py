"""`halfweight demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from ..compress.report import CompressionReport
from . import options
from .compress import show
from .output import human_bytes, human_seconds, out, progress_bars, say, table, write_json


class DemoResult(BaseModel):
    """What `--json` gets: perplexities on the shipped held-out text, bytes on disk, and the compression report."""

    dense_perplexity: float
    compressed_perplexity: float
    dense_bytes: int
    compressed_bytes: int
    report: CompressionReport


def demo(
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to create.")] = Path("smollm2-2of4"),
    recipe: options.RecipeName = "2of4-admm",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """The whole story in one go: fetch SmolLM2-135M, make it 2:4 sparse, reload, verify, and measure both.

    Calibration and evaluation use different public-domain books that ship with halfweight. An earlier DIR is replaced.

    Examples:

        halfweight demo

        halfweight demo --recipe 2of4-wanda --samples 8 --json demo.json
    """
    from ..compress.driver import compress_checkpoint
    from ..compress.memory import return_large_buffers
    from ..compress.recipe import Recipe
    from ..compress.report import Progress
    from ..eval.perplexity import evaluate
    from ..serving.inspect import inspect_checkpoint
    from ..serving.sources import resolve_model

    source = resolve_model("demo", report=say)
    loaded = Recipe.load(recipe).with_calibration(samples=samples, seqlen=seqlen)
    return_large_buffers()
    with progress_bars() as progress:
        report = compress_checkpoint(
            "demo", loaded, output, device=device, dtype=dtype, overwrite=True, progress=progress
        )
    show(report)
    results = {}
    for label, folder in (("dense", source.path), ("compressed", output)):
        with progress_bars() as progress:
            results[label] = evaluate(
                folder,
                seqlen=seqlen,
                device=device,
                dtype=dtype,
                progress=lambda done, total, show=progress: show(Progress("eval", done, total)),  # type: ignore[misc]
            )
    dense, compressed = results["dense"], results["compressed"]
    result = DemoResult(
        dense_perplexity=dense.perplexity,
        compressed_perplexity=compressed.perplexity,
        dense_bytes=inspect_checkpoint(source.path).bytes,
        compressed_bytes=report.bytes,
        report=report,
    )
    write_json(json, result)
    rows = table("SmolLM2-135M, dense beside compressed", "", "dense", "compressed")
    rows.add_row(
        f"perplexity, held-out text ({dense.tokens} tokens)",
        f"{dense.perplexity:.2f}",
        f"{compressed.perplexity:.2f}",
    )
    rows.add_row("bits per decoder weight", "16.000", f"{report.effective_bits:.3f}")
    rows.add_row("size on disk", human_bytes(result.dense_bytes), human_bytes(result.compressed_bytes))
    rows.add_row("time to compress", "", human_seconds(report.seconds))
    out.print(rows)
    say(f"try it: halfweight generate {output} --prompt 'The sea was' --max-new-tokens 24")
