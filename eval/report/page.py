"""Gathers the facts, fills the templates, and writes the page and its Markdown twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...serving.durable import write_text
from ...serving.errors import InputError
from . import sections
from .facts import Rivals, Scored, parse, read_artifact
from .parts import Section, Sources, Tile
from .speed_section import speed


@dataclass(frozen=True)
class Page:
    """What the templates show."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    version: str


def write_page(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    compare: Sequence[str | Path] = (),
    rivals: Sequence[str | Path] = (),
    bench: str | Path | None = None,
    scored: Sequence[str | Path] = (),
    title: str = "",
    command: str = "",
) -> tuple[Path, Path]:
    """Write the page about the artifact in `folder` to `out` (default: its report.html) and, beside it, as Markdown.

    `compare` are further artifacts, `rivals` comparisons (JSON), `bench` a result of `halfweight bench --json`
    (default: the folder's bench.json), `scored` results of `halfweight eval --json`; `title` replaces the folder's
    name, `command` made the page. Returns both files.
    Raises InputError for files that are not what they should be, and RunError when the page cannot be written.
    """
    folder = Path(folder)
    html_file = folder / "report.html" if out is None else Path(out)
    if html_file.suffix != ".html":
        raise InputError(f"--out {html_file}: name an .html file; the Markdown goes beside it")
    page = make_page(
        Sources(
            artifact=read_artifact(folder, None if bench is None else Path(bench)),
            others=[read_artifact(Path(other), hashes=False) for other in compare],
            rivals=[parse(Rivals, Path(file)) for file in rivals],
            scored=[parse(Scored, Path(file)) for file in scored],
            command=command,
            title=title,
        )
    )
    markdown_file = html_file.with_suffix(".md")
    for file, template in ((html_file, "page.html.j2"), (markdown_file, "page.md.j2")):
        write_text(file, render(page, template))
    return html_file, markdown_file


def make_page(sources: Sources) -> Page:
    """The page's content from what was read."""
    from ... import __version__

    parts = [
        sections.headline(sources),
        sections.quality(sources),
        sections.layers(sources),
        sections.search(sources),
        speed(sources),
        sections.calibration(sources),
        *sections.provenance(sources),
    ]
    return Page(
        title=sources.title or sources.artifact.name,
        subtitle=f"{sources.model} by {sources.artifact.run.recipe}",
        tiles=sections.tiles(sources),
        sections=[part for part in parts if part is not None],
        version=__version__,
    )


def render(page: Page, template: str) -> str:
    """`page` through one of the templates; HTML is escaped throughout, Markdown by its own rules."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template(template).render(page=page)


def escape_markdown(text: Any) -> str:
    """Text for a Markdown paragraph or table cell: one line, with nothing in it that means something."""
    line = " ".join(str(text).split())
    for letter in ("&", "<", ">"):
        line = line.replace(letter, {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[letter])
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]|#" else letter for letter in line)
