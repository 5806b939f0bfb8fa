"""What the terminal shows: tables on stdout, progress and errors on stderr, JSON files on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..compress.report import OnProgress, Progress

# Files and pipes have no width; rich would fold what they get at 80 columns.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
err = Console(stderr=True)

_STAGES = {
    "model": "fetch model",
    "embed": "embed",
    "basis": "change basis",
    "allocate": "allocate",
    "metric": "weigh errors",
    "blocks": "compress",
    "end_to_end": "tune",
    "shares": "set thresholds",
    "verify": "reload and verify",
    "hash": "check files",
    "tensors": "check tensors",
    "inputs": "check inputs",
    "sweep": "prune",
    "eval": "evaluate",
    "export": "export",
    "delta": "compare",
    "target": "trials",
    "search": "search",
    "bench": "measure speed",
}


def fail(message: str, code: int) -> NoReturn:
    """Print one error line and exit with `code`."""
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)
    sys.exit(code)


def say(message: str) -> None:
    """One line of commentary on stderr."""
    err.print(escape(message), soft_wrap=True, highlight=False)


def partial_of(json: Path | None) -> Path | None:
    """Where a command keeps its finished pieces until `json` is written: beside it, unless that is a pipe or device."""
    return json.with_name(json.name + ".partial") if json is not None and _is_plain(json) else None


def write_json(file: Path | None, result: BaseModel, partial: Path | None = None) -> None:
    """Write `result` to `file` unless it is None, and then delete `partial`, which it stands for; raises RunError when
    it cannot be written."""
    if file is None:
        return
    from ..serving.durable import disk_errors, write_text

    text = result.model_dump_json(indent=2) + "\n"
    if not _is_plain(file):
        with disk_errors(file):
            file.write_text(text, encoding="utf-8")
        return
    write_text(file, text)
    if partial is not None:
        partial.unlink()


def _is_plain(file: Path) -> bool:
    return file.is_file() or not file.exists()


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A rich table whose first `left` columns are text and the rest numbers."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return result


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """A callback that shows one bar per stage of a run, with time elapsed and left."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", style="dim"),
    )
    bar = Bar(*columns, console=err)
    tasks: dict[str, TaskID] = {}

    def show(progress: Progress) -> None:
        if progress.stage == "model":
            say(progress.detail)
            return
        bar.start()  # not earlier: an error before the first step must be the only line
        if progress.stage not in tasks:
            for other in tasks.values():
                bar.update(other, completed=bar.tasks[other].total, detail="")
            tasks[progress.stage] = bar.add_task(_STAGES.get(progress.stage, progress.stage), detail="")
        bar.update(tasks[progress.stage], completed=progress.done, total=progress.total, detail=escape(progress.detail))

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_seconds(seconds: float) -> str:
    """`48 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
