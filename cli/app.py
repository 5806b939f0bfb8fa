"""The typer application: every verb is registered here, in the order users meet them."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..compress.launch import launched
from .bench import bench
from .compare import compare
from .compress import compress
from .demo import demo
from .evaluate import evaluate
from .export import delta, export
from .generate import generate
from .inspect import inspect
from .kernels import kernels
from .plan import plan
from .recipes import recipes
from .report import report
from .sweep import sweep
from .verify import verify

app = typer.Typer(
    name="halfweight",
    help="Compress language models with structure that GPUs can use, and run them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


_ALONE = {"demo", "sweep", "export", "delta"}  # several processes would write the same files


def _version(show: bool) -> None:
    if show:
        typer.echo(f"halfweight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand in _ALONE and launched():
        raise typer.BadParameter(f"{context.invoked_subcommand} runs in one process; start it without torchrun")


app.command()(demo)
app.command()(plan)
app.command()(compress)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command()(sweep)
app.command()(inspect)
app.command()(verify)
app.command()(generate)
app.command()(export)
app.command()(delta)
app.command()(recipes)
app.command()(kernels)
