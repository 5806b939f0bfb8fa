"""Adds finished runs to docs/results/: a table and a picture per model, and the numbers as JSON.

    python scripts/make_results.py runs/* --name MODEL=SmolLM2-135M --dense SmolLM2-135M=dense.json [--out docs/results]

A run is an artifact folder of `halfweight compress`. Its report.json and recipe.yaml are always used; beside them
eval.json (`halfweight eval RUN --text wikitext2-test.txt --json RUN/eval.json`) and bench.json (`halfweight bench RUN
--json RUN/bench.json`) are used where they are. --name gives the last part of a model's path a name to print; --dense
gives a named model's own eval.json. Nothing is measured here.

results.json remembers earlier runs, since all recipes together take days: a run replaces the one of the same model,
recipe and seed, and every other row stays. Without runs, the table and the pictures are made of what is remembered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfweight.compress.recipe import Recipe, named_recipes
from halfweight.eval.report import charts
from halfweight.eval.report.charts import Point
from halfweight.eval.report.facts import Run, Scored, parse
from halfweight.eval.report.page import escape_markdown
from halfweight.eval.report.parts import duration, size
from halfweight.eval.report.speed_section import smallest_batch
from halfweight.eval.speed import Speed
from halfweight.serving.checkpoint import read_json
from halfweight.serving.durable import write_text
from halfweight.serving.errors import HalfweightError, InputError

RESULTS = "results.json"
STYLE = Path(charts.__file__).parent / "templates" / "page.css"
HEADERS = (
    *("recipe", "text tokens", "bits", "bits read", "bits, whole model", "on disk", "dev ppl", "dev ppl, dense"),
    *("test ppl", "worst error"),
    *("decode tok/s", "x dense", "x int4", "time", "peak GB"),
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="artifact folders")
    parser.add_argument("--name", nargs="*", default=[], metavar="MODEL=NAME")
    parser.add_argument("--dense", nargs="*", default=[], metavar="NAME=EVAL.JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args()
    try:
        names = pairs("--name", args.name)
        dense = {name: parse(Scored, Path(file)).perplexity for name, file in pairs("--dense", args.dense).items()}
        rows = [read_run(folder, names) for folder in args.runs]
        known = read_json(args.out / RESULTS) if (args.out / RESULTS).is_file() else {"dense": {}, "rows": []}
    except HalfweightError as error:
        raise SystemExit(f"error: {error}") from None
    merged = {identity(row): row for row in (*known["rows"], *rows)}
    if not merged:
        raise SystemExit(f"error: no runs given, and {args.out / RESULTS} remembers none")
    args.out.mkdir(parents=True, exist_ok=True)
    for file, text in make_files([merged[key] for key in sorted(merged)], {**known["dense"], **dense}).items():
        write_text(args.out / file, text)
        print(args.out / file)


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """`A=B` arguments as a dictionary; raises InputError for one without `=`."""
    if bad := [value for value in values if "=" not in value]:
        raise InputError(f"{flag} {bad[0]}: needs the form A=B")
    return dict(value.split("=", 1) for value in values)


def identity(row: Row) -> tuple[str, str, int]:
    """What two rows share when one of them is the other measured again."""
    return row["model"], row["recipe"], row["calibration"]["seed"]


def full_name(recipe: Recipe) -> str:
    """The recipe's name and what differs from the shipped one, such as `w4-g64-best, no tuning.end_to_end`; what it was
    calibrated on is left out."""
    if recipe.name not in named_recipes():
        return recipe.name
    own, shipped = (
        one.model_dump(exclude={"calibration", "description"}) for one in (recipe, Recipe.load(recipe.name))
    )
    return ", ".join([recipe.name, *changes(own, shipped)])


def changes(own: Any, shipped: Any, path: str = "") -> list[str]:
    """Where two nested settings differ, in words; a section that only `own` has is named alone."""
    if isinstance(own, Mapping) and isinstance(shipped, Mapping):
        keys = [*own, *(key for key in shipped if key not in own)]
        found = [changes(own.get(key), shipped.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return [change for inner in found for change in inner]
    if isinstance(own, (list, tuple)) and isinstance(shipped, (list, tuple)):
        return changes(dict(enumerate(own)), dict(enumerate(shipped)), path)
    if own == shipped:
        return []
    return [f"no {path}" if own is None else path if isinstance(own, Mapping) else f"{path}={own}"]


def text_tokens(recipe: Recipe) -> int:
    """Tokens of calibration text that the run saw: the calibration's, or tuning's where it takes more."""
    tuned = None if recipe.tuning is None else recipe.tuning.samples
    return max(recipe.calibration.samples, tuned or 0) * recipe.calibration.seqlen


def read_run(folder: Path, names: dict[str, str]) -> Row:
    """The numbers of one run; only names of files go in, not where they lay."""
    run = parse(Run, folder / "report.json")
    recipe = Recipe.load(folder / "recipe.yaml")
    scored = parse(Scored, folder / "eval.json") if (folder / "eval.json").is_file() else None
    speed = parse(Speed, folder / "bench.json") if (folder / "bench.json").is_file() else None
    row: Row = {
        "model": names.get(Path(run.model).name, Path(run.model).name),
        "recipe": full_name(recipe),
        "text_tokens": text_tokens(recipe),
        "tuned": None if recipe.tuning is None else recipe.tuning.model_dump(mode="json"),
        "effective_bits": run.effective_bits,
        "effective_bits_model": run.effective_bits_model,
        "bytes": run.bytes,
        "dev": run.dev.model_dump(),
        "worst_error": max((layer.error for layer in run.layers), default=0.0),
        "seconds": run.seconds,
        "peak_rss_gb": run.peak_rss_gb,
        "threads": None if run.provenance is None else run.provenance.threads,
        "calibration": {"data": Path(run.calibration_data).name, "tokens": run.calibration_tokens, "seed": run.seed},
        "versions": run.versions,
    }
    if scored is not None:
        row["test"] = {**scored.model_dump(exclude={"model"}), "text": Path(scored.text).name}
    best = smallest_batch(speed)
    if speed is not None and best is not None:
        row["speed"] = {
            "device": speed.device,
            "batch": best.batch,
            "dtype": best.dtype,
            "threads": best.threads,
            "decode_tokens_per_second": best.decode.median,
            "ratio_to_dense": best.ratio_to_dense,
            "ratio_to_int4": best.ratio_to_int4,
        }
    return row


def make_files(rows: Sequence[Row], dense: dict[str, float]) -> dict[str, str]:
    """File name -> content; `dense` are test perplexities of the models by name."""
    files = {RESULTS: json.dumps({"dense": dense, "rows": rows}, indent=1, sort_keys=True) + "\n"}
    parts = [f"# Results\n\nMade by `scripts/make_results.py`. {PROTOCOL}\n"]
    for model in sorted({row["model"] for row in rows}):
        found = sorted((row for row in rows if row["model"] == model), key=lambda row: (-bits(row), row["recipe"]))
        parts.append(f"## {escape_markdown(model)}\n")
        for kind, chosen in PICTURES.items():
            if drawn := [row for row in found if chosen(row)]:
                picture = f"{''.join(c if c.isalnum() or c in '-.' else '-' for c in model)}-{kind}.svg"
                files[picture] = draw(drawn, dense.get(model))
                parts.append(f"![{escape_markdown(model)}, {kind}]({picture})\n")
        parts += [f"Dense test perplexity: {dense[model]:.2f}.\n"] if model in dense else []
        parts.append(table(found))
    files["README.md"] = "\n".join(parts)
    return files


def selects(row: Row) -> bool:
    """Whether tokens read a part of their inputs."""
    return row.get("test", {}).get("bits_read") is not None


# Weights that are stored and weights that are read are far apart on one axis, and each has its own cluster of recipes.
PICTURES: dict[str, Callable[[Row], bool]] = {"weights": lambda row: not selects(row), "selections": selects}


def bits(row: Row) -> float:
    """Bits that a token reads per decoder weight."""
    return float(row["test"]["bits_read"] if selects(row) else row["effective_bits"])


PROTOCOL = (
    "Bits are all bits stored for the decoder's linears over their weights; bits read are those of one token, where it"
    " selects its inputs. Text tokens are those a run calibrated and tuned on. Dev perplexity is on the last tenth of"
    " the calibration text, test perplexity on a text that nothing was tuned on (`halfweight eval`). The worst error is"
    " the largest share of output energy that one linear lost, before tuning. Speed is `halfweight bench`, at the"
    " smallest batch, each model in its best setting on the device in results.json; `-` where it was not measured."
    " Times are of whole runs on two CPU cores: with the threads that results.json names and, with one, beside another"
    " run. A row is of the version that measured it."
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one model as a Markdown table."""
    lines = [HEADERS, ["---"] + ["---:"] * (len(HEADERS) - 1)]
    for row in rows:
        speed, test = row.get("speed"), row.get("test")
        lines.append(
            [
                escape_markdown(row["recipe"]),
                str(row["text_tokens"]),
                f"{row['effective_bits']:.2f}",
                f"{bits(row):.2f}" if selects(row) else "",
                f"{row['effective_bits_model']:.2f}",
                size(row["bytes"]),
                f"{row['dev']['compressed']:.2f}",
                f"{row['dev']['dense']:.2f}",
                "-" if test is None else f"{test['perplexity']:.2f}",
                f"{row['worst_error']:.3f}",
                "-" if speed is None else f"{speed['decode_tokens_per_second']:.1f}",
                *(
                    "-" if speed is None or speed[ratio] is None else f"{speed[ratio]:.2f}"
                    for ratio in ("ratio_to_dense", "ratio_to_int4")
                ),
                duration(row["seconds"]),
                f"{row['peak_rss_gb']:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(rows: Sequence[Row], dense: float | None) -> str:
    """Perplexity against bits, on the test text where every run has one, else on the dev set, as an SVG file."""
    tested = dense is not None and all("test" in row for row in rows)
    level = dense if tested and dense is not None else rows[0]["dev"]["dense"]
    points = [
        Point(
            bits(row),
            row["test"]["perplexity"] if tested else row["dev"]["compressed"],
            row["recipe"],
            0 if row["tuned"] is None else 2,
        )
        for row in rows
    ]
    x_title = "bits read per decoder weight" if selects(rows[0]) else "bits stored per decoder weight"
    y_title = "test perplexity" if tested else "dev perplexity"
    colours = {0: "in one shot", 2: "tuned"} if any(point.series for point in points) else None
    svg = str(charts.scatter(points, x_title, y_title, (level, f"dense, {level:.2f}"), colours))
    head, rest = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
    style = STYLE.read_text(encoding="utf-8")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{ground}{rest}\n'


if __name__ == "__main__":
    main()
