"""Resume: what is scored already, in a file beside the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..serving.checkpoint import Checkpoint
from ..serving.durable import append_line, read_lines, write_lines
from .selection import Reading


class Kept:
    """Finished pieces of a measurement, each a line of JSON in `file` (None: nowhere) as soon as it is there.
    Those that a run of another `identity` left do not count."""

    def __init__(self, file: Path | None, identity: str) -> None:
        """Raises RunError when `file` cannot be written."""
        self.file, self.lines = file, list[dict[str, Any]]()
        if file is not None:
            first, found = {"identity": identity}, read_lines(file)
            self.lines = found[1:] if found[:1] == [first] else []
            write_lines(file, [first, *self.lines])

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep another piece. Raises RunError when the file cannot be written."""
        if self.file is not None:
            append_line(self.file, line)


class ScoredWindows:
    """Losses per token, nats, of the windows that are done; those in `kept` are."""

    def __init__(self, kept: Kept, reading: Reading) -> None:
        """`reading` goes on from what the windows in `kept` have read."""
        self.kept = kept
        self.losses = [torch.tensor(line["losses"]) for line in kept.lines]
        if kept.lines:
            reading.sums = tuple(kept.lines[-1]["read"])

    def add(self, losses: Tensor, reading: Reading) -> None:
        """Count another window. Raises RunError when the file cannot be written."""
        self.losses.append(losses)
        self.kept.add({"losses": losses.tolist(), "read": reading.sums})


def identity_of(models: Iterable[str | Path], windows: Sequence[Tensor], settings: str) -> str:
    """Tells the scores of these models on these windows of token ids from all others; SHA-256, hexadecimal."""
    stamps = " ".join(Checkpoint(model).stamp() for model in models)
    digest = hashlib.sha256(f"{stamps} {settings} {version('torch')}".encode())
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()
