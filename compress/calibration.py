"""Calibration text to token windows: deterministic by seed, offline by default, with a held-out dev set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..eval.text import bos_token, builtin_text, consecutive_windows, read_text, tokenize, with_bos
from ..serving.errors import InputError
from ..serving.load import load
from .blocks import batch_size
from .recipe import Calibration
from .search.config import Search
from .world import World

# Calibration draws from the first 90 % of the tokens; the rest is the dev set, for reports, tuning and early stopping.
CALIBRATION_PERCENT = 90
DEV_SHARE = 16  # one dev window per this many calibration windows

_CHARACTERS_PER_TOKEN = 8  # generous, to know how much of a hub dataset to read


@dataclass(frozen=True)
class Windows:
    """Token ids `[L]`, int64: `calibration`; `dev`, never calibrated on; the text had `text_tokens`. `tuning` are the
    windows beyond the calibration's that tuning asked for, `search` those of the dev set that a search tries on.
    `text_sha256` is of the text, if there was one."""

    calibration: list[Tensor]
    dev: list[Tensor]
    text_tokens: int
    tuning: list[Tensor] = field(default_factory=list)
    search: list[Tensor] = field(default_factory=list)
    text_sha256: str | None = None

    @property
    def all(self) -> list[Tensor]:
        """All windows that are trained on, in order."""
        return [*self.calibration, *self.tuning]

    def share(self, world: World) -> Windows:
        """This process's part of the windows: whole batches, where that leaves calibration windows for everybody, so
        that they give the same bits in any number of processes."""

        def part(windows: list[Tensor], one_each: bool) -> list[Tensor]:
            size = batch_size(len(windows[0])) if windows else 1
            if one_each and len(windows) <= size * (world.size - 1):
                size = 1
            batches = [windows[i : i + size] for i in range(0, len(windows), size)]
            return [window for batch in world.share(batches) for window in batch]

        return replace(
            self,
            calibration=part(self.calibration, True),
            dev=part(self.dev, False),
            tuning=part(self.tuning, False),
        )


def load_windows(
    settings: Calibration,
    tokenizer: Any,
    model: Path,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    tuning: int = 0,
    search: Search | None = None,
) -> Windows:
    """Windows for `settings`, at least `tuning` of them to train on, and those of a `search`. `model` (its folder) is
    only loaded for `data: self`.

    Raises InputError when the windows exceed the model's context `max_length` or the text is too short.
    """
    check_context(settings, max_length)
    bos = bos_token(tokenizer)
    if settings.data == "self":
        found = self_windows(settings, model, bos, tuning)
        held_out = torch.cat(found.dev)
    else:
        text = load_text(settings)
        tokens = tokenize(tokenizer, text)
        found = replace(text_windows(tokens, settings, bos, tuning), text_sha256=text_hash(text))
        held_out = tokens[_dev_start(tokens) :]
    return found if search is None else replace(found, search=search_windows(held_out, search, bos, max_length))


def search_windows(tokens: Tensor, search: Search, bos: int | None, max_length: int | None) -> list[Tensor]:
    """The first windows of a `search` in the held-out `tokens` `[n]`, one shorter window where they do not fill any."""
    if max_length is not None and search.seqlen > max_length:
        raise InputError(
            f"search.seqlen: windows of {search.seqlen} tokens exceed the model's context of {max_length}; lower it"
        )
    return consecutive_windows(tokens, min(search.seqlen, len(tokens)), bos, search.samples)


def shared_windows(world: World, load: Callable[[], Windows]) -> Windows:
    """The windows that `load` gives the leader of `world`, for everybody: text is read, or sampled, once.

    Raises InputError when there are fewer calibration windows than processes.
    """
    names = ("calibration", "dev", "tuning", "search")
    found = load() if world.leads else Windows([], [], 0)
    tensors = {name: torch.stack(getattr(found, name)) for name in names if getattr(found, name)}
    got = world.broadcast(tensors, 0, torch.device("cpu"))
    windows = {name: list(got[name]) if name in got else [] for name in names}
    if len(windows["calibration"]) < world.size:
        raise InputError(
            f"{len(windows['calibration'])} calibration windows for {world.size} processes; use --samples"
            f" {world.size} or more, or fewer processes"
        )
    counted, digest = world.shared(found.text_tokens), world.shared(found.text_sha256)
    return Windows(text_tokens=counted, text_sha256=digest, **windows)


def first_windows(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first of the `windows` `[T]`, all of one length: one, or as many as have up to `tokens` tokens together."""
    return list(windows[: max(1, tokens // len(windows[0]))])


def first_tokens(settings: Calibration, tokens: int) -> int:
    """How many tokens the `first_windows` of the calibration's windows have."""
    return min(settings.samples, max(1, tokens // settings.seqlen)) * settings.seqlen


def check_context(settings: Calibration, max_length: int | None) -> None:
    """Raise InputError when the windows do not fit the model's context of `max_length` tokens."""
    if max_length is not None and settings.seqlen > max_length:
        raise InputError(
            f"calibration windows of {settings.seqlen} tokens exceed the model's context of {max_length};"
            f" use --seqlen {max_length} or less"
        )


def dev_windows(samples: int, tuning: int) -> int:
    """How many dev windows go with `samples` calibration and `tuning` tuning windows."""
    return max(1, max(samples, tuning) // DEV_SHARE)


def text_windows(tokens: Tensor, settings: Calibration, bos: int | None, tuning: int = 0) -> Windows:
    """`settings.samples` windows at random starts of the first 90 % of `tokens` `[n]`; dev windows from the rest.

    Starts are `torch.randint(0, n_calibration - seqlen, (samples,))` with a generator seeded by `settings.seed`, and
    those of the windows missing to `tuning` come next from the same generator.
    """
    cut, length = _dev_start(tokens), settings.seqlen
    if cut - length < 1:
        raise InputError(
            f"calibration text has {len(tokens)} tokens, of which {cut} are for calibration; windows of {length} need"
            f" at least {length + 1}: use more text or a smaller --seqlen"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(0, cut - length, (settings.samples,), generator=generator).tolist()
    more = max(0, tuning - settings.samples)
    starts += torch.randint(0, cut - length, (more,), generator=generator).tolist()
    drawn = [with_bos(tokens[start : start + length], bos) for start in starts]
    rest = tokens[cut:]
    if len(rest) < 2:
        raise InputError(
            f"calibration text has {len(tokens)} tokens; its last 10 % must hold at least 2 for the dev set"
        )
    dev = consecutive_windows(rest, min(length, len(rest)), bos, dev_windows(settings.samples, tuning))
    return Windows(drawn[: settings.samples], dev, len(tokens), drawn[settings.samples :])


def self_windows(settings: Calibration, model: Path, bos: int | None, tuning: int = 0, batch: int = 8) -> Windows:
    """Windows sampled from the model itself (LLM-QAT, arXiv 2305.17888): needs no text, but holds the whole model.

    Each starts from a uniformly random token, after BOS where the model wants one, and is sampled at temperature 1.
    """
    network = load(model)
    training = max(settings.samples, tuning)
    total = training + dev_windows(settings.samples, tuning)
    vocabulary = network.config.get_text_config().vocab_size
    lead = [] if bos is None else [torch.full((batch, 1), bos)]
    rows: list[Tensor] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        while len(rows) < total:
            prompt = torch.cat([*lead, torch.randint(0, vocabulary, (batch, 1))], dim=1).to(network.device)
            prompt = prompt[: total - len(rows)]
            new = settings.seqlen - prompt.shape[1]
            output = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new,
                min_new_tokens=new,
            )
            rows.extend(output.cpu().unbind())
    tokens = sum(len(row) for row in rows)
    return Windows(rows[: settings.samples], rows[training:], tokens, rows[settings.samples : training])


def _dev_start(tokens: Tensor) -> int:
    return len(tokens) * CALIBRATION_PERCENT // 100


def text_hash(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_text(settings: Calibration) -> str:
    """The text that `settings.data` names: a file's, the built-in one, or a hub dataset's. Raises InputError."""
    if settings.data == "builtin":
        return builtin_text("calibration")
    path = Path(settings.data)
    if path.exists() or path.suffix in (".txt", ".jsonl", ".gz", ".md"):
        return read_text(path)
    return _hub_text(settings)


def _hub_text(settings: Calibration) -> str:
    """As much as needed of the `text` column of a hub dataset's train split (`name` or `name:configuration`)."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"calibration data {settings.data!r} is not a file, and reading it from the hub needs the datasets package:"
            " pip install 'halfweight[eval]'"
        ) from None
    name, _, configuration = settings.data.partition(":")
    needed = settings.samples * settings.seqlen * _CHARACTERS_PER_TOKEN
    documents: list[str] = []
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows:
            documents.append(row["text"])
            needed -= len(row["text"])
            if needed <= 0:
                break
    except KeyError:
        raise InputError(f"calibration dataset {settings.data!r} has no column `text`") from None
    except Exception as error:  # the datasets package raises many kinds; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"calibration data {settings.data!r}: no such file, and not readable from the hub ({reason})"
        ) from None
    if not documents:
        raise InputError(f"calibration dataset {settings.data!r} is empty")
    return "\n\n".join(documents)
