"""Options that several verbs share, spelled once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..serving.errors import InputError


def _writable(file: Path | None) -> Path | None:
    """Refuse a result file that cannot be written before the work starts, not after."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise InputError(f"--json {file}: cannot be written; name a file in a folder that exists")
    return file


Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a GGUF file, or [bold]demo[/].")]
Folder = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name or a YAML file.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: a .txt or .jsonl file, a hub dataset, builtin, or self (the model's own)."
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration windows; overrides the recipe (default 32).")]
Seqlen = Annotated[int | None, typer.Option(min=2, help="Tokens per window; overrides the recipe (default 1024).")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the windows; overrides the recipe (default 0).")]
EmbeddingBits = Annotated[
    int | None,
    typer.Option("--embeddings", metavar="BITS", help="Also round the embedding and the head: 8 or 4 bits."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=_writable, help="Also write the result as JSON.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto (float32 on CPU), float32, bfloat16, float16.")]
BlockDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Compute dtype: auto (on CPU bfloat16 if it multiplies that, else float32), float32, bfloat16, float16.",
    ),
]
ActivationMemory = Annotated[
    float | None,
    typer.Option(
        "--activation-memory",
        metavar="GB",
        help="Keep activations in files in DIR.partial where they need more than this; slower, the same result.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a checkpoint to bring files of its own code.")
]
Tuning = Annotated[
    str | None,
    typer.Option(
        "--tuning", help="Stages of tuning to run: none, block, end-to-end or both; default: what the recipe says."
    ),
]
TuningSamples = Annotated[
    int | None, typer.Option("--tuning-samples", min=1, help="Windows to tune on; overrides the recipe.")
]
BlockEpochs = Annotated[
    int | None, typer.Option("--block-epochs", min=1, help="Passes over them by block; overrides the recipe.")
]
EndToEndEpochs = Annotated[
    int | None, typer.Option("--end-to-end-epochs", min=1, help="Passes over them end to end; overrides the recipe.")
]
Search = Annotated[
    str | None,
    typer.Option(
        "--search",
        metavar="METHOD",
        help="How to search what selections read: none, evolution, tpe, cma or random; default: what the recipe says.",
    ),
]
SearchTrials = Annotated[
    int | None, typer.Option("--search-trials", min=2, help="Trials of the search; overrides the recipe.")
]


def names(text: str, option: str) -> list[str]:
    """The parts of a comma-separated option; raises InputError when there is none, or one twice."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(set(parts)) < len(parts):
        raise InputError(f"{option} {text!r}: give different names, separated by commas")
    return parts


def batch_size(text: str) -> int | str:
    """`auto` or a positive number; raises InputError for anything else."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size {text!r}: give a positive number or auto")
    return int(text)


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a comma-separated option; raises InputError for anything else."""
    try:
        return [float(part) for part in names(text, option)]
    except ValueError:
        raise InputError(f"{option} {text!r}: give numbers, separated by commas") from None
