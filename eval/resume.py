"""Resume: the windows of a text that are scored already, in a file beside the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..serving.durable import append_line, read_lines, write_lines
from .selection import Reading


class ScoredWindows:
    """Losses per token, nats, of the windows that are done. With a `file`, each is a line of it as soon as it is
    scored, and those that are in it count, unless another `identity` (model, text, settings) scored them."""

    def __init__(self, file: Path | None, identity: str, reading: Reading) -> None:
        """`reading` goes on from what the windows in the file have read. Raises RunError when `file` cannot be
        written."""
        self.file, self.losses = file, list[Tensor]()
        if file is None:
            return
        first, lines = {"identity": identity}, read_lines(file)
        done = lines[1:] if lines[:1] == [first] else []
        for line in done:
            self.losses.append(torch.tensor(line["losses"]))
            reading.sums = tuple(line["read"])
        write_lines(file, [first, *done])

    def add(self, losses: Tensor, reading: Reading) -> None:
        """Count another window. Raises RunError when the file cannot be written."""
        self.losses.append(losses)
        if self.file is not None:
            append_line(self.file, {"losses": losses.tolist(), "read": reading.sums})
