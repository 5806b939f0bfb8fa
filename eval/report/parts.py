"""What the page is made of: sections of figures, tables and text as plain data, and how numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from .facts import Artifact, Rivals, Scored


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text under `headers`; the first `left` columns are words. A `folded` table opens on request."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    folded: bool = False
    strong: int | None = None


@dataclass(frozen=True)
class Section:
    """A titled part of the page; whatever is empty is left out."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    code: str = ""


@dataclass(frozen=True)
class Tile:
    """A number to be seen first, what it is, and a word beside it."""

    value: str
    label: str
    note: str = ""


@dataclass
class Sources:
    """Everything the page is made from; `others` are artifacts to compare with."""

    artifact: Artifact
    others: list[Artifact] = field(default_factory=list)
    rivals: list[Rivals] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    command: str = ""
    title: str = ""

    @property
    def model(self) -> str:
        """The model without the folder it lay in."""
        return Path(self.artifact.run.model).name


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """`48 s`, `3 min` or `2.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
