"""Options that several verbs share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a GGUF file, or [bold]demo[/].")]
Folder = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name or a YAML file.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto (float32 on CPU), float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow a checkpoint to bring files of its own code.")
]
