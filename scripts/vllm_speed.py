"""Tokens per second of checkpoints under vLLM's HTTP server on this CPU, one after the other in one run.

    python scripts/vllm_speed.py DIR [DIR ...] [--batch 1 8] [--env FOLDER] [--json FILE]

For every DIR, dense or compressed, it starts the server in bf16 on loopback and sends `batch` greedy requests at
once, three rounds each after one to warm up. A round's number is all new tokens over the seconds until the last request
has finished, prefill included. Prints a Markdown table of medians, with the lowest and highest. The environment is that
of vllm_check.py, which makes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from vllm_check import PROMPTS, ROOT, ask, make_environment, serving

NEW_TOKENS = 64
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="checkpoints; the first is what others are compared with")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="requests at once")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-vllm")
    parser.add_argument("--json", type=Path, help="also write the rates of every round to this file")
    arguments = parser.parse_args()
    make_environment(arguments.env)
    measured = {}
    for folder in arguments.folders:
        with serving(arguments.env, folder, dtype="bfloat16") as url:
            measured[str(folder)] = {batch: rates(url, folder, batch) for batch in arguments.batch}
    print(table(measured))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def rates(url: str, folder: Path, batch: int) -> list[float]:
    """New tokens per second of each round."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    found = []
    with ThreadPoolExecutor(batch) as pool:
        for _ in range(1 + ROUNDS):
            start = time.perf_counter()
            counts = list(pool.map(lambda prompt: generated(url, folder, prompt), prompts))
            found.append(sum(counts) / (time.perf_counter() - start))
    return found[1:]


def generated(url: str, folder: Path, prompt: str) -> int:
    """Tokens that a greedy request brought."""
    with ask(url, folder, prompt, max_tokens=NEW_TOKENS) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


def table(measured: dict[str, dict[int, Sequence[float]]]) -> str:
    """Markdown: a row per checkpoint and batch, with the ratio to the first checkpoint."""
    first = next(iter(measured.values()))
    lines = ["| checkpoint | requests | tokens/s | low-high | x first |", "|---|---|---|---|---|"]
    for folder, by_batch in measured.items():
        for batch, found in by_batch.items():
            ratio = median(found) / median(first[batch])
            spread = f"{min(found):.1f}-{max(found):.1f}"
            lines.append(f"| {Path(folder).name} | {batch} | {median(found):.1f} | {spread} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
