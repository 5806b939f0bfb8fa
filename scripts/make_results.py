"""Writes docs/results/ from finished runs: a table and a picture per model, and the numbers as JSON.

    python scripts/make_results.py runs/* --name MODEL=SmolLM2-135M --dense SmolLM2-135M=dense.json [--out docs/results]

A run is an artifact folder of `halfweight compress`. Its report.json is always used; beside it eval.json (`halfweight
eval RUN --text wikitext2-test.txt --json RUN/eval.json`) and bench.json (`halfweight bench RUN --json RUN/bench.json`)
are used where they are. --name gives the last part of a model's path a name to print; --dense gives a named model's own
eval.json. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfweight.eval.report import charts
from halfweight.eval.report.charts import Point
from halfweight.eval.report.facts import Run, Scored, parse
from halfweight.eval.report.page import escape_markdown
from halfweight.eval.report.parts import duration, size
from halfweight.eval.report.speed_section import smallest_batch
from halfweight.eval.speed import Speed
from halfweight.serving.errors import HalfweightError, InputError

STYLE = Path(charts.__file__).parent / "templates" / "page.css"
HEADERS = (
    *("recipe", "bits", "bits, whole model", "on disk", "dev ppl", "dev ppl, dense", "test ppl", "worst error"),
    *("decode tok/s", "x dense", "x int4", "time", "peak GB"),
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="artifact folders")
    parser.add_argument("--name", nargs="*", default=[], metavar="MODEL=NAME")
    parser.add_argument("--dense", nargs="*", default=[], metavar="NAME=EVAL.JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args()
    try:
        names = pairs("--name", args.name)
        dense = {name: parse(Scored, Path(file)).perplexity for name, file in pairs("--dense", args.dense).items()}
        rows = [read_run(folder, names) for folder in args.runs]
    except HalfweightError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    for file, text in make_files(rows, dense).items():
        (args.out / file).write_text(text, encoding="utf-8")
        print(args.out / file)


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """`A=B` arguments as a dictionary; raises InputError for one without `=`."""
    if bad := [value for value in values if "=" not in value]:
        raise InputError(f"{flag} {bad[0]}: needs the form A=B")
    return dict(value.split("=", 1) for value in values)


def read_run(folder: Path, names: dict[str, str]) -> Row:
    """The numbers of one run; only names of files go in, not where they lay."""
    run = parse(Run, folder / "report.json")
    scored = parse(Scored, folder / "eval.json") if (folder / "eval.json").is_file() else None
    speed = parse(Speed, folder / "bench.json") if (folder / "bench.json").is_file() else None
    row: Row = {
        "model": names.get(Path(run.model).name, Path(run.model).name),
        "recipe": run.recipe,
        "effective_bits": run.effective_bits,
        "effective_bits_model": run.effective_bits_model,
        "bytes": run.bytes,
        "dev": run.dev.model_dump(),
        "worst_error": max((layer.error for layer in run.layers), default=0.0),
        "seconds": run.seconds,
        "peak_rss_gb": run.peak_rss_gb,
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
    files = {"results.json": json.dumps({"dense": dense, "rows": rows}, indent=1, sort_keys=True) + "\n"}
    parts = [f"# Results\n\nMade by `scripts/make_results.py`. {PROTOCOL}\n"]
    for model in sorted({row["model"] for row in rows}):
        found = sorted((row for row in rows if row["model"] == model), key=lambda row: -row["effective_bits"])
        picture = f"{''.join(c if c.isalnum() or c in '-.' else '-' for c in model)}.svg"
        files[picture] = draw(found, dense.get(model))
        baseline = f"\nDense test perplexity: {dense[model]:.2f}.\n" if model in dense else ""
        parts += [f"## {escape_markdown(model)}\n\n![{escape_markdown(model)}]({picture})\n{baseline}", table(found)]
    files["README.md"] = "\n".join(parts)
    return files


PROTOCOL = (
    "Bits are all bits stored for the decoder's linears over their weights. Dev perplexity is on the last tenth of the"
    " calibration text, test perplexity on a text that nothing was tuned on (`halfweight eval`). The worst error is the"
    " largest share of output energy that one linear lost. Speed is `halfweight bench`, at the smallest batch, each"
    " model in its best setting on the device in results.json; `-` where it was not measured."
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one model as a Markdown table."""
    lines = [HEADERS, ["---"] + ["---:"] * (len(HEADERS) - 1)]
    for row in rows:
        speed, test = row.get("speed"), row.get("test")
        lines.append(
            [
                escape_markdown(row["recipe"]),
                f"{row['effective_bits']:.2f}",
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
            row["effective_bits"],
            row["test"]["perplexity"] if tested else row["dev"]["compressed"],
            row["recipe"],
            0,
        )
        for row in rows
    ]
    title = "test perplexity" if tested else "dev perplexity"
    svg = str(charts.scatter(points, "bits per decoder weight", title, (level, f"dense, {level:.2f}")))
    head, rest = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
    style = STYLE.read_text(encoding="utf-8")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{ground}{rest}\n'


if __name__ == "__main__":
    main()
