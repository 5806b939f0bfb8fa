"""`halfweight report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import out


def report(
    folder: options.Folder,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another artifact to show beside it; repeat for more.")
    ] = None,
    rivals: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A comparison with other tools (compare.json); repeat for more."),
    ] = None,
    scored: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="A result of `halfweight eval --json`; repeat for more."),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A result of `halfweight bench --json`; default: DIR/bench.json."),
    ] = None,
    title: Annotated[str, typer.Option(help="What to call the artifact; default: the folder's name.")] = "",
    output: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file to write; default: DIR/report.html.")
    ] = None,
) -> None:
    """Write one HTML page about an artifact, which needs no network, and the same as Markdown beside it.

    Examples:

        halfweight report smollm2-2of4

        halfweight report smollm2-2of4 --compare smollm2-w4 --rivals results/compare.json --out page.html
    """
    from ..eval.report import write_page

    named = {"--compare": compare, "--rivals": rivals, "--eval": scored}
    flags = [f"{flag} {shlex.quote(str(value))}" for flag, values in named.items() for value in values or ()]
    flags += [
        f"{flag} {shlex.quote(str(v))}" for flag, v in (("--bench", bench), ("--title", title), ("--out", output)) if v
    ]
    page, markdown = write_page(
        folder,
        output,
        compare=compare or (),
        rivals=rivals or (),
        bench=bench,
        scored=scored or (),
        title=title,
        command=" ".join(["halfweight report", shlex.quote(str(folder)), *flags]),
    )
    out.print(f"{page}\n{markdown}", markup=False, highlight=False, soft_wrap=True)
