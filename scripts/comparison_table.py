"""What a comparison with llm-compressor is written down as: facts of the machine, and tables of rows."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
# A run had the machine to itself when everything else used less than this share of its CPU time.
IDLE_SHARE = 0.05


def idle(cell: Record) -> bool:
    """Whether a run had the machine to itself, so that its seconds mean something."""
    return bool(cell["others_share"] < IDLE_SHARE)


def machine_facts() -> Record:
    """Processor, cores, memory, and the versions on halfweight's side."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        fields = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
        cpu = next((value.strip() for name, _, value in fields if name.strip() == "model name"), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"halfweight": {name: installed(name) for name in ("halfweight", "torch", "transformers")}},
    }


def installed(name: str) -> str:
    """The version of an installed distribution; a source tree on the path has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "(source tree)"


HEADERS = (
    *("model", "tool", "method", "ppl", "ppl per seed", "ppl ratio"),
    *("seconds", "seconds ratio", "peak GB", "memory ratio", "linear bytes"),
)


def as_text(row: Record) -> list[str]:
    """A row as text in the order of HEADERS, `-` where a number does not apply."""

    def show(name: str, digits: int) -> str:
        return f"{row[name]:.{digits}f}" if name in row else "-"

    method, against = row["method"], row.get("compared_with", row["method"])
    quality = [
        show("perplexity", 3),
        ", ".join(f"{value:.3f}" for value in row.get("perplexity_each", [])) or "-",
    ]
    cost = [show("seconds", 0), show("seconds_ratio", 2), show("peak_gb", 2), show("peak_gb_ratio", 2)]
    label = method if against == method else f"{method} (to {against})"
    return [
        row["model"],
        row["tool"],
        label,
        *quality,
        show("perplexity_ratio", 3),
        *cost,
        show("linear_bytes_ratio", 4),
    ]


def markdown(rows: list[Record], machine: Record, protocol: Record) -> str:
    """The comparison as a Markdown page."""
    versions = "; ".join(
        f"{side} with " + ", ".join(f"{name} {number}" for name, number in found.items())
        for side, found in machine["versions"].items()
    )
    samples, seqlen = protocol["samples"], protocol["seqlen"]
    lines = f"""# halfweight and llm-compressor

- Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["memory_gb"]} GB, {machine["system"]},
  Python {machine["python"]}. CPU only, {protocol["threads"]} threads per tool.
- llm-compressor's precision: {protocol["peer_precision"]}. halfweight's is its own default for the machine.
- Versions: {versions}.
- Calibration: {samples} windows of {seqlen} tokens ({samples * seqlen} tokens), the same for both tools.
- Perplexity: first {protocol["eval_windows"]} windows of {seqlen} tokens of the text, by `halfweight eval`.
- Seconds and peak GB (1e9 bytes) are of the whole process: imports, calibration and saving included.
- Seconds are means over seeds during whose runs other processes took less than {IDLE_SHARE:.0%} of the CPU, else `-`.
- Ratios are halfweight / llm-compressor over the same seeds: below 1 is better for halfweight.
- Linear bytes: bytes stored for the decoder linears over their dense bytes; llm-compressor's are not packed here.
- llm-compressor's 2of4-w4 quantizes after pruning; `two_of_four` in a run's file says whether the pattern was left.

""".splitlines()
    table = [HEADERS, ["---"] * len(HEADERS), *(as_text(row) for row in rows)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in table)]) + "\n"


def print_table(rows: list[Record]) -> None:
    """The comparison on the terminal."""
    table = Table(title="halfweight / llm-compressor")
    for header in HEADERS:
        table.add_column(header, justify="left" if header in HEADERS[:3] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*as_text(row))
    Console(width=max(Console().width, 170)).print(table)
