"""`halfweight export` and `halfweight delta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import human_bytes, human_seconds, out, progress_bars, write_json

Output = Annotated[Path, typer.Option("--out", metavar="OUT", help="What to create: a folder, or FILE.gguf.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there when done.")]


def export(
    folder: options.Folder,
    to: Annotated[str, typer.Option(help="dense (any engine), w4 (compressed-tensors int4) or gguf (llama.cpp).")],
    output: Output,
    overwrite: Overwrite = False,
    json: options.Json = None,
) -> None:
    """Rewrite a compressed checkpoint for engines that do not know halfweight, and say what that keeps.

    Examples:

        halfweight export smollm2-2of4 --to dense --out smollm2-dense

        halfweight export smollm2-w4 --to w4 --out smollm2-packed

        halfweight export smollm2-w4 --to gguf --out smollm2.gguf
    """
    from ..compress.export.job import export_checkpoint

    with progress_bars() as progress:
        report = export_checkpoint(folder, to, output, overwrite=overwrite, progress=progress)
    write_json(json, report)
    out.print(f"{report.out}: {human_bytes(report.bytes)} in {human_seconds(report.seconds)}", highlight=False)
    for line in report.statement:
        out.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def delta(
    base: Annotated[Path, typer.Argument(help="The checkpoint folder that was fine-tuned.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tune, or with --apply a delta of it.")],
    output: Output,
    apply: Annotated[bool, typer.Option("--apply", help="Rebuild the fine-tune from BASE and a delta.")] = False,
    overwrite: Overwrite = False,
    json: options.Json = None,
) -> None:
    """Store a fine-tune as what it changed of its base: a bitmap and the changed numbers, lossless.

    Examples:

        halfweight delta base tuned --out tuned-delta

        halfweight delta base tuned-delta --apply --out tuned-again
    """
    from ..compress.export.delta import apply_delta, make_delta
    from ..serving.errors import InputError

    if apply and json is not None:
        raise InputError("--json has nothing to report with --apply; leave it out")
    with progress_bars() as progress:
        if apply:
            apply_delta(base, tuned, output, overwrite=overwrite, progress=progress)
            out.print(f"{output}: {tuned} applied to {base}", highlight=False)
            return
        report = make_delta(base, tuned, output, overwrite=overwrite, progress=progress)
    write_json(json, report)
    out.print(
        f"{report.out}: {report.changed} of {report.numbers} numbers changed, {report.equal} of {report.tensors}"
        f" tensors equal; {human_bytes(report.bytes)} for {human_bytes(report.tuned_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
