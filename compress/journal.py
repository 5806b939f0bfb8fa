"""Resume: which blocks are durably done, and whether this run is the one that did them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..serving.checkpoint import Checkpoint
from ..serving.durable import append_line, disk_errors, read_lines, sha256_of, write_lines
from ..serving.errors import InputError
from . import writer
from .world import ALONE, World
from .writer import JOURNAL


class Journal:
    """`journal.jsonl` in the work folder: a fingerprint, then one line per finished part with its hash and report rows.

    A part is written and synced before its line is; a line that does not parse, or whose part has another hash, ends
    the valid prefix, and everything after it is done again. Lines may also be notes, which belong to no part. Of
    several processes the leader reads and writes; the others have the same entries.
    """

    def __init__(self, folder: Path, fingerprint: str, fresh: bool = False, world: World = ALONE) -> None:
        """Opens or starts the journal; raises InputError when `folder` holds another run's unfinished work, or is not
        the leader's folder."""
        self.folder, self.file, self.world = folder, folder / JOURNAL, world
        self.entries: list[dict[str, Any]] = []
        if world.leads:
            self._open(fingerprint, fresh)
        self.entries = world.shared(self.entries)
        if not world.leads and read_lines(self.file)[:1] != [{"fingerprint": fingerprint}]:
            raise InputError(f"{folder}: is another folder here than for rank 0; choose an --out that all hosts share")

    def _open(self, fingerprint: str, fresh: bool) -> None:
        folder, lines = self.folder, read_lines(self.file)
        if lines and not fresh:
            if lines[0].get("fingerprint") != fingerprint:
                raise InputError(
                    f"{folder}: holds an unfinished run of another model, data, recipe or dtype; finish that one, or"
                    " pass --fresh to discard it"
                )
            self.entries = self._valid_prefix(lines[1:])
        else:
            for leftover in folder.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_lines(self.file, [{"fingerprint": fingerprint}, *self.entries])

    def _valid_prefix(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        valid = []
        for entry in entries:
            part = self.folder / str(entry.get("part"))
            if "note" not in entry and (not part.is_file() or sha256_of(part) != entry.get("sha256")):
                break
            valid.append(entry)
        return valid

    def done(self, part: str) -> dict[str, Any] | None:
        """The entry of a finished part, or None."""
        return next((entry for entry in self.entries if entry.get("part") == part), None)

    @property
    def parts(self) -> list[str]:
        """The finished parts, in the order they were recorded."""
        return [str(entry["part"]) for entry in self.entries if "part" in entry]

    def notes(self, about: str) -> list[dict[str, Any]]:
        """What was noted about something, in order."""
        return [entry["is"] for entry in self.entries if entry.get("note") == about]

    def note(self, about: str, what: Mapping[str, Any]) -> None:
        """Append `what`, as JSON, to the notes about something, and make the line durable."""
        self._append({"note": about, "is": dict(what)})

    def store(self, part: str, tensors: dict[str, Tensor], **fields: Any) -> None:
        """Write a part and its entry, both durably. What the leader passes counts."""
        if self.world.leads:
            writer.write_part(self.folder / part, tensors)
        self.record(part, **fields)

    def record(self, part: str, **fields: Any) -> None:
        """Append the entry of `part` (already durable) and make the line durable. What the leader passes counts."""
        self._append({"part": part, "sha256": sha256_of(self.folder / part), **fields} if self.world.leads else {})

    def _append(self, entry: dict[str, Any]) -> None:
        if self.world.leads:
            append_line(self.file, entry)
        self.entries.append(self.world.shared(entry))


def clear_scaffold(out: Path) -> None:
    """Remove from a published folder what only its making needed: the finished parts, then the journal that names them,
    and the folder it has replaced. Does nothing to other folders, so it may be repeated."""
    journal = out / JOURNAL
    lines = read_lines(journal)
    if not lines or "fingerprint" not in lines[0] or not (out / "config.json").is_file():
        return
    with disk_errors(out):
        for part in (out / Path(str(entry.get("part"))).name for entry in lines[1:]):
            if part.is_file():
                part.unlink()
        shutil.rmtree(out.with_name(out.name + ".replaced"), ignore_errors=True)
        journal.unlink()


def tokens_hash(windows: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of token windows, hexadecimal."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint, windows: Iterable[Tensor], *settings: str) -> str:
    """Hash over the model (config, tensor headers, shard sizes and times), the token windows and further settings.

    How many processes share the work is no part of it.
    """
    digest = hashlib.sha256()
    digest.update(checkpoint.stamp().encode())
    for setting in (tokens_hash(windows), *settings):
        digest.update(setting.encode() + b"\0")
    return digest.hexdigest()
