"""Compress a model by recipe after recipe and score each result: the runs that make_results.py makes docs/results/ of.

    python scripts/run_recipes.py SmolLM2-135M=DIR --recipes w4-g64 2of4-best --calibration c4.txt \
        --text wikitext2-test.txt --windows 16 --out runs

Each run is a folder OUT/NAME-RECIPE with report.json and eval.json; the dense model's score is OUT/NAME-dense.json.
What is finished stays, an interrupted compression resumes, and a run that fails is named in the end and does not stop
the others. `--bench` also times each result beside dense and int4 (bench.json), which needs a machine without other
work. `--slim` deletes the tensors of a run once it is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

console = Console(highlight=False)


def halfweight(*arguments: str | Path) -> bool:
    """Whether the command ended well; its output is this process's."""
    return subprocess.run([sys.executable, "-m", "halfweight", *map(str, arguments)]).returncode == 0


def score(model: str | Path, result: Path, options: argparse.Namespace) -> bool:
    """Score a checkpoint on the text, unless `result` is there."""
    windows = [] if options.windows is None else ["--windows", str(options.windows)]
    settings = ["--text", options.text, "--seqlen", str(options.seqlen), *windows]
    return result.is_file() or halfweight("eval", model, *settings, "--json", result)


def time_speed(out: Path, dense: str, result: Path) -> bool:
    """Time a checkpoint at batch 1, unless `result` is there."""
    return result.is_file() or halfweight("bench", out, "--dense", dense, "--batch", "1", "--json", result)


def run(name: str, model: str, recipe: str, options: argparse.Namespace) -> bool:
    """Compress and measure by one recipe, as far as that is not done; whether it is done now."""
    out = options.out / f"{name}-{Path(recipe).stem}"
    scored, timed = out / "eval.json", out / "bench.json"
    if scored.is_file() and (timed.is_file() or not options.bench):
        return True
    begin = time.monotonic()
    console.rule(f"{name} by {recipe}")
    settings = ["--recipe", recipe, "--calibration", options.calibration, "--seed", str(options.seed)]
    if not (out.is_dir() or halfweight("compress", model, *settings, "--out", out)):
        return False
    if not (score(out, scored, options) and (not options.bench or time_speed(out, model, timed))):
        return False
    console.print(f"{name} by {recipe}: {time.monotonic() - begin:.0f} s")
    if options.slim:
        for tensors in out.glob("*.safetensors"):
            tensors.unlink()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR", help="dense checkpoints, and what to call them")
    parser.add_argument("--recipes", nargs="+", required=True, help="names of shipped recipes, or YAML files")
    parser.add_argument("--calibration", required=True, help="text to calibrate, tune and search on")
    parser.add_argument("--text", required=True, help="text to score on, which nothing else sees")
    parser.add_argument("--windows", type=int, help="windows to score (default: all)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per scored window")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--bench", action="store_true", help="time the results, too")
    parser.add_argument("--slim", action="store_true", help="delete tensors when a run is measured")
    options = parser.parse_args()
    if bad := [model for model in options.models if "=" not in model]:
        raise SystemExit(f"error: {bad[0]}: needs the form NAME=DIR")
    models = dict(model.split("=", 1) for model in options.models)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [
        f"{name} dense" for name in models if not score(models[name], options.out / f"{name}-dense.json", options)
    ]
    for recipe in options.recipes:
        failed += [f"{name} by {recipe}" for name in models if not run(name, models[name], recipe, options)]
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
