"""Whether a launcher started this process; knows no torch, so that every verb can ask."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether this is one of several processes that a launcher such as `torchrun` started."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def leads() -> bool:
    """Whether this is the one process, or the first of several."""
    return not launched() or os.environ["RANK"] == "0"
