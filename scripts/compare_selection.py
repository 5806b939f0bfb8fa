"""What tokens should read of a model's weights: methods of input selection side by side, at the same bytes.

    python scripts/compare_selection.py MODEL --calibration C4.txt --text WIKITEXT.txt --windows 16 --out results/

Compresses MODEL by each method at each level (the share of bytes that is not read), scores it on --text, and prints one
table. Its measure is the share of TEAL-uniform's increase in log perplexity over the dense model that a method has: 1
is TEAL, 0 the dense model. Thresholds meet a level on the calibration text, so that on the text that is scored methods
read a little more or less: TEAL is the cell of it that reads nearest as many bytes, at most 1 % more or fewer, and more
of them can be asked for (--teal-levels). `agrees` is the share of greedy tokens that are the dense model's, before the
first that is not, in continuations of the text that is scored. `random` is the control of a search: as many trials,
spread evenly. Searches and thresholds see --calibration alone; all but the first 1 % of a window's tokens select.

Every finished cell is in --out's results.json, and the table of all of them in its README.md; a cell's checkpoint is
deleted (--keep keeps it), and the same command goes on where it stopped, also within a cell. --report-only makes the
table of the finished cells.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from halfweight import Recipe, compress_checkpoint
from halfweight.cli.output import progress_bars
from halfweight.eval.agreement import generate, shared_tokens
from halfweight.eval.perplexity import evaluate
from halfweight.eval.text import bos_token, exact_windows, read_text, tokenize
from halfweight.serving.durable import write_text
from halfweight.serving.load import load, load_tokenizer
from halfweight.serving.sources import resolve_model

_RSPARSE = {"score": "l1", "channels": 0.95, "branch": "weight"}
_GREEDY = {"allocation": "greedy"}
_FISHER = {"allocation": "fisher"}

# Method -> its selection, and how it searches.
DEFAULT: dict[str, tuple[dict[str, Any], str | None]] = {
    "teal": ({}, None),
    "teal-greedy": (_GREEDY, None),
    "wina": ({"score": "l2"}, None),
    "rsparse": (_RSPARSE, None),
    "rsparse-searched": (_RSPARSE, "evolution"),
    "rsparse-random": (_RSPARSE, "random"),
    "teal-greedy-searched": (_GREEDY, "evolution"),
    "teal-greedy-random": (_GREEDY, "random"),
    "teal-greedy-descent": (_GREEDY, "descent"),
    "teal-fisher": (_FISHER, None),
    "teal-fisher-descent": (_FISHER, "descent"),
}
METHODS = DEFAULT | {
    "rsparse-tpe": (_RSPARSE, "tpe"),
    "rsparse-cma": (_RSPARSE, "cma"),
    "rsparse-inputs": ({**_RSPARSE, "branch": "inputs"}, None),
    "rsparse-inputs-searched": ({**_RSPARSE, "branch": "inputs"}, "evolution"),
    "rsparse-greedy-searched": ({**_RSPARSE, **_GREEDY}, "evolution"),
    "teal-searched": ({}, "evolution"),
    "teal-fisher-searched": (_FISHER, "evolution"),
    "topk": ({"threshold": "topk"}, None),
    "topk-fisher": ({"threshold": "topk", **_FISHER}, None),
    "wina-fisher": ({"score": "l2", **_FISHER}, None),
    "rsparse-fisher": ({**_RSPARSE, **_FISHER}, None),
    "wina-greedy-searched": ({"score": "l2", **_GREEDY}, "evolution"),
}
PROMPT, NEW = 64, 64  # tokens of the prompts, and of what models make of them
BASELINE, EQUAL = "teal", 0.01
RESULTS, TABLE = "results.json", "README.md"

Cell = dict[str, Any]
console = Console()


def recipe_of(method: str, level: float, settings: Mapping[str, Any]) -> Recipe:
    """`method` at `level` %, calibrated and searched as `settings` say."""
    selection, search = METHODS[method]
    calibration = {
        "data": settings["calibration"],
        "samples": settings["samples"],
        "seqlen": settings["calibration_seqlen"],
        "seed": settings["seed"],
    }
    stage = {"pass": "keep", "selection": {"sparsity": level / 100, **selection}}
    data: dict[str, Any] = {"name": f"{method}-{level:g}", "calibration": calibration, "stages": [stage]}
    if search is not None:
        data["search"] = {
            "method": search,
            "trials": settings["trials"],
            "samples": settings["search_samples"],
            "seqlen": settings["search_seqlen"],
            "seed": settings["seed"],
        }
    return Recipe.parse(data)


def run_cell(
    model: str, dense: Cell, method: str, level: float, settings: Mapping[str, Any], out: Path, keep: bool
) -> Cell:
    """Compress and score one cell."""
    artifact = out / f"{method}-{level:g}"
    console.print(f"{method} at {level:g} %", highlight=False)
    with progress_bars() as progress:
        report = compress_checkpoint(
            model,
            recipe_of(method, level, settings),
            artifact,
            overwrite=True,
            dtype=settings["dtype"],
            progress=progress,
        )
    score = scored(artifact, settings)
    shared = shared_tokens(dense["continuations"], score.pop("continuations"))
    if not keep:
        shutil.rmtree(artifact)
    return {
        "method": method,
        "level": level,
        **score,
        "agreement": sum(shared) / (NEW * len(shared)) if shared else None,
        "dev_perplexity": report.dev.compressed,
        "seconds": report.seconds,
        "search": [trial.objective for trial in report.search],
    }


def scored(folder: str | Path, settings: Mapping[str, Any]) -> Cell:
    """Perplexity of a checkpoint, what its selecting linears read, and how it continues prompts."""
    result = evaluate(
        folder, settings["text"], windows=settings["windows"], seqlen=settings["seqlen"], dtype=settings["dtype"]
    )
    kept = ("perplexity", "standard_error", "tokens", "sparse_tokens", "bytes_read_fraction")
    numbers = {name: getattr(result, name) for name in kept}
    return {**numbers, "continuations": continuations(folder, settings)}


def continuations(folder: str | Path, settings: Mapping[str, Any]) -> list[list[int]]:
    """Greedy tokens after the text's first prompts."""
    if not settings["prompts"]:
        return []
    tokenizer = load_tokenizer(folder)
    tokens = tokenize(tokenizer, read_text(settings["text"]))
    prompts = exact_windows(tokens, PROMPT, bos_token(tokenizer), settings["prompts"])
    return generate(load(folder, dtype=settings["dtype"]), prompts, PROMPT, NEW)


def with_shares(cells: Sequence[Cell], dense: Cell) -> list[Cell]:
    """The cells with the `share` of the baseline's increase in log perplexity over dense, where one reads as much."""

    def increase(cell: Cell) -> float:
        return math.log(cell["perplexity"] / dense["perplexity"])

    def share(cell: Cell) -> float | None:
        def apart(other: Cell) -> float:
            return float(abs(cell["bytes_read_fraction"] / other["bytes_read_fraction"] - 1))

        nearest = min((other for other in cells if other["method"] == BASELINE), key=apart, default=None)
        return None if nearest is None or apart(nearest) > EQUAL else increase(cell) / increase(nearest)

    return [{**cell, "share": share(cell)} for cell in cells]


def table(cells: Sequence[Cell], dense: Cell, settings: Mapping[str, Any]) -> Table:
    """One table, in Markdown."""
    about = (
        f"dense perplexity {dense['perplexity']:.3f}, {settings['windows'] or 'all'} windows of {settings['seqlen']}"
    )
    rows = Table(title=f"{settings['model']}: {about}", title_justify="left", box=MARKDOWN)
    headers = ("level", "method", "perplexity", "share", "agrees", "read", "trials")
    for number, header in enumerate(headers):
        rows.add_column(header, justify="left" if number == 1 else "right", no_wrap=number == 1)
    for cell in cells:
        rows.add_row(
            f"{cell['level']:g} %",
            cell["method"],
            f"{cell['perplexity']:.3f}",
            "-" if cell["share"] is None else f"{cell['share']:.3f}",
            "-" if cell["agreement"] is None else f"{100 * cell['agreement']:.1f} %",
            f"{cell['bytes_read_fraction']:.4f}",
            str(len(cell["search"])) if cell["search"] else "-",
        )
    return rows


def opened(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `out` holds; refuses one whose cells are of other settings."""
    file = out / RESULTS
    if not file.is_file():
        return {"settings": dict(settings), "dense": None, "cells": []}
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise SystemExit(f"{out}: holds cells of another model, text or settings; choose another --out")
    return results


def save(out: Path, results: Mapping[str, Any]) -> list[Cell]:
    """Write what is finished and the table of it; the cells as they are in the table."""
    cells = sorted(results["cells"], key=lambda cell: (cell["level"], list(METHODS).index(cell["method"])))
    cells = with_shares(cells, results["dense"])
    page = io.StringIO()
    Console(file=page, width=120).print(table(cells, results["dense"], results["settings"]))
    write_text(out / RESULTS, json.dumps({**results, "cells": cells}, indent=1) + "\n")
    write_text(out / TABLE, "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()))
    return cells


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense checkpoint: a folder, a hub id, a GGUF file or demo")
    parser.add_argument("--calibration", required=True, help="text to calibrate and search on")
    parser.add_argument("--text", required=True, help="text to score on, which nothing else sees")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cells")
    parser.add_argument("--levels", type=float, nargs="+", default=[40, 50, 65], help="%% of the bytes not read")
    parser.add_argument("--teal-levels", type=float, nargs="+", default=[], help="more of them, for the measure alone")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(DEFAULT),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument("--windows", type=int, help="windows to score (default: all)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per scored window")
    parser.add_argument("--prompts", type=int, default=32, help=f"of {PROMPT} tokens, continued by {NEW}")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--calibration-seqlen", type=int, default=1024, help="tokens per calibration window")
    parser.add_argument("--trials", type=int, default=64, help="trials of every search")
    parser.add_argument("--search-samples", type=int, default=4, help="dev windows per trial")
    parser.add_argument("--search-seqlen", type=int, default=512, help="tokens per dev window")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows and the searches")
    parser.add_argument("--dtype", default="auto", help="compute dtype, as of halfweight compress and eval")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--report-only", action="store_true", help="make the table of the finished cells")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    names = ("calibration", "text", "windows", "seqlen", "prompts", "samples", "calibration_seqlen", "trials")
    names += ("search_samples", "search_seqlen", "seed", "dtype")
    settings = {"model": options.model, **{name: getattr(options, name) for name in names}}
    options.out.mkdir(parents=True, exist_ok=True)
    results = opened(options.out, settings)
    folder = str(resolve_model(options.model).path)
    results["dense"] = dense = results["dense"] or scored(folder, settings)
    asked = [(level, method) for level in options.levels for method in options.methods]
    asked += [(level, BASELINE) for level in options.teal_levels]
    done = {(cell["level"], cell["method"]) for cell in results["cells"]}
    cells = save(options.out, results)
    for level, method in asked:
        if (level, method) not in done and not options.report_only:
            results["cells"].append(run_cell(folder, dense, method, level, settings, options.out, options.keep))
            cells = save(options.out, results)
    console.print(table(cells, dense, settings))


if __name__ == "__main__":
    main()
