"""Adds finished runs to docs/results/: a table and a picture per model, and the numbers as JSON.

    python scripts/make_results.py runs/* --name MODEL=SmolLM2-135M --dense SmolLM2-135M=dense.json [--out docs/results]

A run is an artifact folder of `halfweight compress`. Its report.json and recipe.yaml are always used; beside them
eval.json (`halfweight eval RUN --text wikitext2-test.txt --json RUN/eval.json`) and bench.json (`halfweight bench RUN
--json RUN/bench.json`) are used where they are. --name gives the last part of a model's path a name to print; --dense
gives a named model's own eval.json; --rivals takes a compare.json of scripts/compare_llmcompressor.py, whose other
tools are drawn beside the runs. Nothing is measured here.

results.json remembers earlier runs, since all recipes together take hours: a run replaces the one of the same model,
recipe, flags and seed, and every other row stays. Without runs, the page is made of what is remembered.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import textalloc
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from halfweight.compress.recipe import Recipe, named_recipes
from halfweight.eval.report.facts import Rivals, Run, Scored, Searched, parse
from halfweight.eval.report.page import escape_markdown
from halfweight.eval.report.parts import duration, size
from halfweight.eval.report.speed_section import smallest_batch
from halfweight.eval.speed import Speed
from halfweight.serving.checkpoint import read_json
from halfweight.serving.durable import write_text
from halfweight.serving.errors import HalfweightError, InputError

RESULTS = "results.json"
HEADERS = (
    *("recipe", "text tokens", "bits", "bits read", "bits, whole model", "on disk", "dev ppl", "dev ppl, dense"),
    *("test ppl", "worst error"),
    *("decode tok/s", "x dense", "x int4", "time", "peak GB"),
)

Row = dict[str, Any]
Rival = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="artifact folders")
    parser.add_argument("--name", nargs="*", default=[], metavar="MODEL=NAME")
    parser.add_argument("--dense", nargs="*", default=[], metavar="NAME=EVAL.JSON")
    parser.add_argument("--rivals", type=Path, metavar="COMPARE.JSON", help="its models are those that --name gives")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results")
    args = parser.parse_args()
    try:
        names = pairs("--name", args.name)
        dense = {name: parse(Scored, Path(file)).perplexity for name, file in pairs("--dense", args.dense).items()}
        rows = [read_run(folder, names) for folder in args.runs]
        rivals = [] if args.rivals is None else read_rivals(args.rivals, names)
        known = read_json(args.out / RESULTS) if (args.out / RESULTS).is_file() else {}
    except HalfweightError as error:
        raise SystemExit(f"error: {error}") from None
    found = {
        "dense": {**known.get("dense", {}), **dense},
        "rivals": merge(known.get("rivals", []), rivals, lambda rival: (rival["model"], rival["label"])),
        "rows": merge(known.get("rows", []), rows, identity),
    }
    if not found["rows"]:
        raise SystemExit(f"error: no runs given, and {args.out / RESULTS} remembers none")
    args.out.mkdir(parents=True, exist_ok=True)
    for file, text in make_files(**found).items():
        write_text(args.out / file, text)
        print(args.out / file)


def merge(known: Sequence[Row], new: Sequence[Row], identity: Callable[[Row], tuple[Any, ...]]) -> list[Row]:
    """Both, sorted by `identity`; of those with the same one the last."""
    merged = {str(identity(row)): row for row in (*known, *new)}
    return sorted(merged.values(), key=identity)


def identity(row: Row) -> tuple[Any, ...]:
    """What two rows share when one of them is the other measured again."""
    return row["model"], row["recipe"], row["changes"], row["seed"]


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """`A=B` arguments as a dictionary; raises InputError for one without `=`."""
    if bad := [value for value in values if "=" not in value]:
        raise InputError(f"{flag} {bad[0]}: needs the form A=B")
    return dict(value.split("=", 1) for value in values)


def by_flags(recipe: Recipe, searched: Searched | None = None) -> list[str]:
    """What flags made of a shipped recipe, such as `no tuning.end_to_end`; what it was calibrated on is left out.

    A run that `searched` has what it found in its recipe, in place of the search; that is no change.
    """
    if recipe.name not in named_recipes():
        return []
    own, shipped = (
        one.model_dump(exclude={"calibration", "description"}) for one in (recipe, Recipe.load(recipe.name))
    )
    if searched is not None:
        own["search"] = searched.settings.model_dump()
        for stage, asked in zip(own["stages"], shipped["stages"], strict=True):
            if stage["selection"] and asked["selection"]:
                stage["selection"] |= {key: asked["selection"][key] for key in ("profile", "allocation")}
    return changes(own, shipped)


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
        "recipe": recipe.name,
        "changes": by_flags(recipe, run.searched),
        "text_tokens": text_tokens(recipe),
        "tuned": None if recipe.tuning is None else recipe.tuning.model_dump(mode="json"),
        "effective_bits": run.effective_bits,
        "effective_bits_model": run.effective_bits_model,
        "bytes": run.bytes,
        "dev": run.dev.model_dump(),
        "worst_error": max((layer.error for layer in run.layers), default=0.0),
        "seconds": None if run.blocks_resumed else run.seconds,  # a resumed run knows its last part's alone
        "peak_rss_gb": run.peak_rss_gb,
        "threads": None if run.provenance is None else run.provenance.threads,
        "seed": run.seed,
        "calibration": {"data": Path(run.calibration_data).name, "tokens": run.calibration_tokens},
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


def read_rivals(file: Path, names: dict[str, str]) -> list[Rival]:
    """What other tools reach in a comparison."""
    return [
        {
            "model": names.get(row.model, row.model),
            "label": row.label,
            "bits": row.stored_bits,
            "perplexity": row.perplexity,
        }
        for row in parse(Rivals, file).rows
        if row.tool not in ("dense", "halfweight")
    ]


def make_files(rows: Sequence[Row], dense: dict[str, float], rivals: Sequence[Rival]) -> dict[str, str]:
    """File name -> content; `dense` are test perplexities of the models by name."""
    everything = {"dense": dense, "rivals": rivals, "rows": rows}
    files = {RESULTS: json.dumps(everything, indent=1, sort_keys=True) + "\n"}
    parts = [f"# Results\n\nMade by `scripts/make_results.py`. {PROTOCOL}\n"]
    for model in sorted({row["model"] for row in rows}):
        found = sorted(
            (row for row in rows if row["model"] == model), key=lambda row: (-bits(row), row["recipe"], row["changes"])
        )
        parts.append(f"## {escape_markdown(model)}\n")
        for kind, chosen in PICTURES.items():
            if drawn := [row for row in found if chosen(row) and not row["changes"] and not behind_prompts(row)]:
                picture = f"{''.join(c if c.isalnum() or c in '-.' else '-' for c in model)}-{kind}.svg"
                beside = [rival for rival in rivals if rival["model"] == model and kind == "weights"]
                files[picture] = draw(drawn, dense.get(model), beside)
                parts.append(f"![{escape_markdown(model)}, {kind}]({picture})\n")
        parts += [f"Dense test perplexity: {dense[model]:.2f}.\n"] if model in dense else []
        parts.append(table(found))
    files["README.md"] = "\n".join(parts)
    return files


def selects(row: Row) -> bool:
    """Whether tokens read a part of their inputs."""
    return row.get("test", {}).get("bits_read") is not None


def behind_prompts(row: Row) -> bool:
    """Whether it was scored on what follows prompts, which are other tokens than those of other runs."""
    return row.get("test", {}).get("prompt_tokens") is not None


# Weights that are stored and weights that are read are far apart on one axis, and each has its own cluster of recipes.
PICTURES: dict[str, Callable[[Row], bool]] = {"weights": lambda row: not selects(row), "selections": selects}


def bits(row: Row) -> float:
    """Bits that a token reads per decoder weight."""
    return float(row["test"]["bits_read"] if selects(row) else row["effective_bits"])


PROTOCOL = (
    "Bits are all bits stored for the decoder's linears over their weights; bits read are those of one token, where it"
    " selects its inputs. Text tokens are those a run calibrated and tuned on. Dev perplexity is on the last tenth of"
    " the calibration text, of which runs with more text take more, so it compares with the dense one beside it; test"
    " perplexity on a text that nothing was tuned on (`halfweight eval`), and * of what follows prompts of a quarter of"
    " its windows, which choose the inputs: not to be compared with other rows. The worst error is the largest share of"
    " output energy that one linear lost, before tuning. Speed is `halfweight bench`, at the smallest batch, each model"
    " in its best setting on the device in results.json; `-` where it was not measured. Times are of whole runs on two"
    " CPU cores: with the threads that results.json names and, with one, beside other runs; `-` where a run was"
    " interrupted. A row is of the version that measured it. Other tools' numbers are those of"
    " `scripts/compare_llmcompressor.py`."
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one model as a Markdown table."""
    lines = [HEADERS, ["---"] + ["---:"] * (len(HEADERS) - 1)]
    for row in rows:
        speed, test = row.get("speed"), row.get("test")
        lines.append(
            [
                escape_markdown(", ".join([row["recipe"], *row["changes"]])),
                str(row["text_tokens"]),
                f"{row['effective_bits']:.2f}",
                f"{bits(row):.2f}" if selects(row) else "",
                f"{row['effective_bits_model']:.2f}",
                size(row["bytes"]),
                f"{row['dev']['compressed']:.2f}",
                f"{row['dev']['dense']:.2f}",
                "-" if test is None else f"{test['perplexity']:.2f}" + (" \\*" if behind_prompts(row) else ""),
                f"{row['worst_error']:.3f}",
                "-" if speed is None else f"{speed['decode_tokens_per_second']:.1f}",
                *(
                    "-" if speed is None or speed[ratio] is None else f"{speed[ratio]:.2f}"
                    for ratio in ("ratio_to_dense", "ratio_to_int4")
                ),
                "-" if row["seconds"] is None else duration(row["seconds"]),
                f"{row['peak_rss_gb']:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(rows: Sequence[Row], dense: float | None, rivals: Sequence[Rival]) -> str:
    """Perplexity against bits, on the test text where every run has one, else on the dev set, as an SVG file.

    `rivals` are drawn beside runs that have a test perplexity, which is what theirs are. A line joins the recipes that
    no other beats at as few bits.
    """
    tested = dense is not None and all("test" in row for row in rows)
    level = dense if tested and dense is not None else rows[0]["dev"]["dense"]
    own = [
        (bits(row), row["test"]["perplexity"] if tested else row["dev"]["compressed"], row["recipe"], row["tuned"])
        for row in rows
    ]
    kinds = {
        ("in one shot", "C0", "o"): [point[:3] for point in own if point[3] is None],
        ("tuned", "C2", "o"): [point[:3] for point in own if point[3] is not None],
        ("other tools", "0.5", "s"): [(r["bits"], r["perplexity"], r["label"]) for r in rivals if tested],
    }
    points = [point for kind in kinds.values() for point in kind]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.axhline(level, linestyle="--", color="0.5", linewidth=1)
    axes.annotate(  # to the right, where few bits are far
        f"dense, {level:.2f}",
        (0.99, level),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="0.4",
        fontsize=9,
    )
    axes.plot(*zip(*front([point[:2] for point in own]), strict=True), color="0.85", linewidth=4, zorder=0)
    for (kind, color, marker), drawn in kinds.items():
        if drawn:
            x, y, _ = zip(*drawn, strict=True)
            axes.plot(x, y, marker, color=color, markersize=6, markeredgecolor="white", label=kind)
    axes.set_xlim(0, 1.08 * max(point[0] for point in points))
    axes.set_xlabel("bits read per decoder weight" if selects(rows[0]) else "bits stored per decoder weight")
    axes.set_ylabel("test perplexity" if tested else "dev perplexity")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=9)
    figure.draw_without_rendering()  # the labels' places depend on the layout
    x, y, names = ([*column] for column in zip(*points, strict=True))
    textalloc.allocate(axes, x, y, names, x_scatter=x, y_scatter=y, textsize=9, linecolor="0.6", linewidth=0.7)
    with io.BytesIO() as file, rc_context({"svg.hashsalt": "halfweight", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue().decode()


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bits, perplexity) that have a lower perplexity than all with as few bits, by bits."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


if __name__ == "__main__":
    main()
