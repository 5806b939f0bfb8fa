"""Measure what more processes are worth: one compression by 1, 2, ... of them under `torchrun`, with one thread each.

    python scripts/measure_scaling.py MODEL --calibration TEXT --recipe 2of4-sparsegpt --processes 1 2 --out FOLDER

Shows wall time, the speed-up and which share of a linear speed-up that is (`--efficiency` of estimate_scale.py), the
largest process's memory, and whether tensors and config have the bytes of the first run. More processes than cores
share those, so their times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def measure(processes: int, arguments: list[str], out: Path) -> dict[str, Any]:
    """One compression by so many processes; times in seconds, memory in 10^9 bytes."""
    shutil.rmtree(out, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "-m", "halfweight", "compress", *arguments, "--out", str(out), "--fresh"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    row = {"processes": report["processes"], "windows": report["windows_by_process"]}
    return row | {"seconds": report["seconds"], "peak_gb": report["peak_rss_gb"]}


def contents(folder: Path) -> dict[str, bytes]:
    """What must not depend on the number of processes."""
    return {file.name: file.read_bytes() for file in (*folder.glob("*.safetensors"), folder / "config.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense checkpoint")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--recipe", default="2of4-sparsegpt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the artifacts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arguments = [options.model, "--calibration", options.calibration, "--samples", str(options.samples)]
    arguments += ["--recipe", options.recipe]
    rows, first = [], options.out / f"by-{options.processes[0]}"
    for processes in options.processes:
        out = options.out / f"by-{processes}"
        row = measure(processes, arguments, out)
        speedup = rows[0]["seconds"] / row["seconds"] if rows else 1.0
        share = speedup * options.processes[0] / processes
        rows.append(row | {"speedup": speedup, "efficiency": share, "same_bytes": contents(out) == contents(first)})
    table = Table(title=f"{options.recipe} by processes of one thread, {os.cpu_count()} cores", title_justify="left")
    for column in ("processes", "seconds", "speed-up", "of linear", "peak GB, each", "same bytes"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = [f"{row[key]:.2f}" for key in ("speedup", "efficiency", "peak_gb")]
        table.add_row(str(row["processes"]), f"{row['seconds']:.0f}", *numbers, "yes" if row["same_bytes"] else "no")
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
