"""Tokens per second of greedy decoding at batch 1, dense beside compressed, each in its best setting.

    python scripts/bench_decode.py DENSE COMPRESSED [COMPRESSED ...] --json decode.json

Every model runs the same loop: a short prompt, then --tokens steps through the KV cache, argmax on the logits. For
each model every dtype and thread count asked for is tried; the table shows all of them and compares the best dense
setting with each compressed model's best. Rounds go over all settings in turn, so slow spells of the machine hit
every setting; the figures are medians over rounds, with the spread beside them. Timings are of this machine only.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import halfweight
from halfweight.serving.errors import HalfweightError
from halfweight.serving.linear import CompressedLinear

PROMPT = "The sea was calm that morning, and the fishermen"


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, list[int]]:
    """Greedy-decode `tokens` tokens after `prompt` `[1, T]`; returns seconds of the decode steps and the token ids."""
    out = model(input_ids=prompt, use_cache=True)
    ids = [int(out.logits[0, -1].argmax())]
    begin = time.perf_counter()
    for _ in range(tokens):
        step = torch.tensor([[ids[-1]]])
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        ids.append(int(out.logits[0, -1].argmax()))
    return time.perf_counter() - begin, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="dense model: folder, hub id, or demo")
    parser.add_argument("compressed", nargs="+", type=Path, help="compressed folders")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()

    try:
        dense = halfweight.resolve_model(args.dense).path
        models = {
            (name, dtype): halfweight.load(path, "cpu", dtype)
            for name, path in [("dense", dense), *((folder.name, folder) for folder in args.compressed)]
            for dtype in args.dtypes
        }
        tokenizer = halfweight.load_tokenizer(dense)
    except HalfweightError as error:
        raise SystemExit(f"error: {error}") from None
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids

    seconds: dict[tuple[str, str, int], list[float]] = {}
    texts: dict[tuple[str, str, int], str] = {}
    for round_ in range(args.rounds + 1):  # the first warms caches and compiles; it does not count
        for (name, dtype), model in models.items():
            for threads in args.threads:
                torch.set_num_threads(threads)
                taken, ids = decode(model, prompt, args.tokens if round_ else 4)
                if round_:
                    seconds.setdefault((name, dtype, threads), []).append(taken)
                    texts[name, dtype, threads] = tokenizer.decode(ids)

    rows = [
        {
            "model": name,
            "dtype": dtype,
            "threads": threads,
            "tokens_per_second": args.tokens / median(taken),
            "tokens_per_second_each": [args.tokens / t for t in taken],
            "implementations": implementations(models[name, dtype]),
            "text": texts[name, dtype, threads],
        }
        for (name, dtype, threads), taken in seconds.items()
    ]
    best = {row["model"]: row for row in sorted(rows, key=lambda row: row["tokens_per_second"])}
    for row in rows:
        row["ratio_to_best_dense"] = row["tokens_per_second"] / best["dense"]["tokens_per_second"]
        row["best_of_model"] = row is best[row["model"]]
    show(console, rows)
    if args.json:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"tokens": args.tokens, "machine": machine, "rows": rows}, indent=2) + "\n")


def implementations(model: torch.nn.Module) -> dict[str, int]:
    """How many compressed linears run on which implementation; empty for a dense model."""
    found = (m.implementation() for m in model.modules() if isinstance(m, CompressedLinear))
    return dict(Counter(f"{chosen.backend}: {chosen.reason}" for chosen in found if chosen is not None))


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the table; the best setting of each model is in bold."""
    table = Table(title="greedy decoding, batch 1, tokens per second (median, all rounds)")
    for header in ("model", "dtype", "threads", "tokens/s", "each round", "of best dense"):
        table.add_column(header, justify="left" if header in ("model", "dtype") else "right")
    for row in rows:
        each = ", ".join(f"{value:.1f}" for value in row["tokens_per_second_each"])
        table.add_row(
            row["model"],
            row["dtype"],
            str(row["threads"]),
            f"{row['tokens_per_second']:.1f}",
            each,
            f"{row['ratio_to_best_dense']:.2f}",
            style="bold" if row["best_of_model"] else None,
        )
    console.print(table)
    for row in rows:
        if row["best_of_model"]:
            console.print(f"[bold]{row['model']}[/bold] ({row['dtype']}): {row['text'][:200]!r}")


if __name__ == "__main__":
    main()
