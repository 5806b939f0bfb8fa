"""Files that are whole or absent: written beside their place, synced, renamed; a failed write is one clear line. And
files of JSON lines that grow line by line, of which what is whole counts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import RunError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write below into one RunError line that names `path`, the reason and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            s in str(error) for s in ("os error 28", "os error 27")
        )
        advice = (
            "free some space and run the same command again; it resumes" if full else "check the folder's permissions"
        )
        reason = (
            "the disk is full or a size limit is reached" if full else (getattr(error, "strerror", None) or str(error))
        )
        raise RunError(f"cannot write {path}: {reason}; {advice}") from None


def write_text(file: Path, text: str) -> None:
    """Write `text` to `file` atomically and durably. Raises RunError."""
    temporary = file.with_name(file.name + ".tmp")
    with disk_errors(file):
        temporary.write_text(text, encoding="utf-8")
        commit(temporary, file)


def write_lines(file: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write `entries` to `file` atomically and durably, each a line of JSON. Raises RunError."""
    write_text(file, "".join(json.dumps(entry) + "\n" for entry in entries))


def append_line(file: Path, entry: Mapping[str, Any]) -> None:
    """Add a line of JSON to `file`, durably. Raises RunError."""
    with disk_errors(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines up to the first that is damaged; none where there is no file."""
    lines: list[dict[str, Any]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            lines.append(entry)
    return lines


def commit(temporary: Path, file: Path) -> None:
    """Rename `temporary` to `file` once its bytes are on disk."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
