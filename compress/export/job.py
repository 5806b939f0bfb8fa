"""`export_checkpoint`: a compressed checkpoint rewritten for engines that do not know halfweight."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel

from ...serving.durable import commit, disk_errors
from ...serving.errors import InputError, did_you_mean
from .. import writer
from ..report import OnProgress, Progress, silent
from .contents import Contents, read_contents
from .gguf import require_package, write_gguf
from .safetensors import Step, write_dense, write_w4

Target = Literal["dense", "w4", "gguf"]


class ExportReport(BaseModel):
    """What `export_checkpoint` wrote; `statement` says in plain words what of the compression is kept and what lost."""

    path: str
    out: str
    to: Target
    bytes: int
    seconds: float
    statement: list[str]


def export_checkpoint(
    path: str | Path, to: str, out: str | Path, *, overwrite: bool = False, progress: OnProgress = silent
) -> ExportReport:
    """Write the halfweight checkpoint at `path` as `out`: `dense`, `w4` (a folder each) or `gguf` (a file).

    `dense` is an ordinary Hugging Face checkpoint, `w4` is int4 in compressed-tensors' `pack-quantized` format. Memory
    stays at a few hundred MB and one matrix. Raises InputError for what the format cannot hold and for a damaged or
    uncompressed checkpoint, RunError when writing fails; `out` appears whole or not at all.
    """
    begin = time.monotonic()
    source, out = Path(path), Path(out)
    target: Target | None = next((known for known in get_args(Target) if known == to), None)
    if target is None:
        raise InputError(f"--to {to} is unknown{did_you_mean(to, list(get_args(Target)))}")
    if target == "gguf":
        require_package()
        _check_file(out, overwrite)
    else:
        writer.check_folder(out, overwrite)
    contents = read_contents(source)

    def step(done: int, total: int, name: str) -> None:
        progress(Progress("export", done, total, name))

    if target == "gguf":
        statement = _write_file(contents, out, step)
    else:
        write: Callable[[Contents, Path, Step], list[str]] = write_dense if target == "dense" else write_w4
        with new_folder(out, overwrite) as folder:
            statement = write(contents, folder, step)
    files = [out] if out.is_file() else [file for file in out.iterdir() if file.is_file()]
    return ExportReport(
        path=str(source),
        out=str(out),
        to=target,
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - begin,
        statement=statement,
    )


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A work folder beside `out` that becomes `out` when the `with` succeeds, and disappears when it fails."""
    writer.check_folder(out, overwrite)
    work = out.with_name(out.name + ".writing")
    with disk_errors(out):
        if work.exists():
            shutil.rmtree(work)  # of an interrupted export, which is not resumed
        work.mkdir(parents=True)
    try:
        yield work
        writer.publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_file(out: Path, overwrite: bool) -> None:
    if out.suffix != ".gguf" or out.is_dir():
        raise InputError(f"{out}: --to gguf writes one file; give --out a name that ends in .gguf")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; choose another --out, or pass --overwrite to replace it")


def _write_file(contents: Contents, out: Path, step: Step) -> list[str]:
    work = out.with_name(out.name + ".writing")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            statement = write_gguf(contents, work, step)
            commit(work, out)
    finally:
        work.unlink(missing_ok=True)
    return statement
