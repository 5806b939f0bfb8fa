"""`halfweight verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .output import fail, out, progress_bars, write_json


def verify(
    folder: options.Folder,
    model: Annotated[
        str | None, typer.Option(help="Also check that this folder, hub id, GGUF file or demo is what was compressed.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="The calibration text, where it is not at the recipe's place any more.")
    ] = None,
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="Also compress MODEL again, in DIR.again, and compare the bytes.")
    ] = False,
    json: options.Json = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Check that an artifact is what was written, and made from what it says; exit code 1 when it is not.

    Examples:

        halfweight verify smollm2-2of4

        halfweight verify smollm2-2of4 --model demo --reproduce
    """
    from ..compress.verify import verify_checkpoint

    with progress_bars() as progress:
        report = verify_checkpoint(
            folder,
            model,
            calibration,
            reproduce=reproduce,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    write_json(json, report)
    for line in (*report.problems, *(f"note: {note}" for note in report.notes)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    found = [f"{report.files} files and {report.weights} compressed weights are as written"]
    if report.inputs:
        found.append(f"{report.inputs} inputs are those of the run")
    if report.reproduced:
        found.append("compressing again gives the same bytes")
    out.print(f"{folder}: {'; '.join(found)}", markup=False, highlight=False, soft_wrap=True)
    if report.problems:
        count = len(report.problems)
        fail(f"{folder}: {count} problem{'s' if count > 1 else ''} found", 1)
