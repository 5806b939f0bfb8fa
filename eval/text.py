"""Text to token windows, the same way for calibration and evaluation."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..serving.errors import InputError

_TEXT_KEYS = ("text", "content")


def builtin_text(name: str) -> str:
    """`calibration` or `heldout`: public-domain text that ships with halfweight (sources in data/README.md)."""
    package = __package__.rpartition(".")[0]
    return (resources.files(package) / "data" / f"{name}.txt").read_text(encoding="utf-8")


def read_text(file: str | Path) -> str:
    """Text of a `.jsonl`/`.jsonl.gz` file (documents joined by blank lines) or of any other file, as UTF-8.

    Raises InputError for a missing, binary, malformed or empty file.
    """
    path = Path(file)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()  # every line ending becomes \n
    except FileNotFoundError:
        raise InputError(f"{path}: no such text file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if ".jsonl" in path.suffixes[-2:]:
        text = "\n\n".join(_documents(path, text))
    if not text.strip():
        raise InputError(f"{path}: the text is empty")
    return text


def _documents(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
        value = record if isinstance(record, str) else None
        if isinstance(record, dict):
            value = next((record[key] for key in _TEXT_KEYS if isinstance(record.get(key), str)), None)
        if value is None:
            raise InputError(f"{path}:{number}: no text; each line needs the key `text`")
        documents.append(value)
    return documents


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids `[n]`, int64, of the whole text at once, as the tokenizer does it by default (Gemma's adds BOS)."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def bos_token(tokenizer: Any) -> int | None:
    """The BOS id when this tokenizer puts one before every text by default (Gemma, Llama), else None."""
    ids = tokenizer("a")["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def consecutive_windows(tokens: Tensor, seqlen: int, bos: int | None, count: int | None = None) -> list[Tensor]:
    """The first `count` (default: all) non-overlapping windows `[seqlen]`; their first token becomes `bos` if given.

    Raises InputError, with the numbers, when the tokens do not fill one window.
    """
    if len(tokens) < seqlen:
        raise InputError(
            f"the text has {len(tokens)} tokens, too few for one window of {seqlen};"
            " use more text or a smaller --seqlen"
        )
    windows = list(tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)[:count].clone())
    return [with_bos(window, bos) for window in windows]


def exact_windows(tokens: Tensor, seqlen: int, bos: int | None, count: int | None) -> list[Tensor]:
    """`consecutive_windows`, but InputError when there are fewer than `count` (None: as many as there are)."""
    chosen = consecutive_windows(tokens, seqlen, bos, count)
    if count is not None and len(chosen) < count:
        raise InputError(
            f"the text fills {len(chosen)} windows of {seqlen} tokens, fewer than --windows {count}; use more text"
        )
    return chosen


def with_bos(window: Tensor, bos: int | None) -> Tensor:
    """`window` with its first token replaced by `bos`, unchanged when that is None."""
    if bos is not None:
        window = window.clone()
        window[0] = bos
    return window
