"""Writing a checkpoint so that a crash at any moment leaves nothing that looks whole.

Work goes on in `DIR.partial`: one safetensors part per block, each durable before the journal mentions it. At the end
their bytes and those of the tensors that stay as they were are copied into shards, so that memory stays flat, and the
folder is renamed to `DIR`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..serving.checkpoint import DTYPES, WEIGHTS_STEM, TensorInfo, read_header
from ..serving.durable import commit, disk_errors, sync_folder
from ..serving.errors import InputError, RunError
from ..serving.transformers_plugin import write_index

# Everything in a checkpoint folder that is not weights and belongs to the model.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

JOURNAL = "journal.jsonl"
SHARD_BYTES = 2 * 2**30
_PART_BYTES = 2**28
_COPY_BYTES = 2**24


def check_folder(out: Path, overwrite: bool) -> None:
    """Raise InputError unless `out` may become a new folder, or with `overwrite` replace an old one."""
    if not out.name:
        raise InputError(f"{out}: cannot be created or replaced as a whole; choose another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out}: the folder is not empty; choose another --out, or pass --overwrite to replace it")


def prepare(out: Path, overwrite: bool) -> Path:
    """Create the work folder `OUT.partial`; raises InputError when `out` is taken, or cannot be written."""
    check_folder(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / JOURNAL).is_file():
        raise InputError(f"{partial}: holds files that are not an unfinished run; move them, or choose another --out")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        probe = partial / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{partial}: cannot be written ({error.strerror}); choose another --out") from None
    return partial


@contextmanager
def alone_in(partial: Path) -> Iterator[None]:
    """Hold the work folder while the `with` lasts; raises InputError while another process does.

    The lock goes with the process, however it ends. Where folders cannot be locked (Windows) nothing is held.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial}: another run works in it; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def no_empty_leftover(partial: Path) -> Iterator[None]:
    """Remove the work folder again when the `with` fails before anything is in it."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it holds an unfinished run
            partial.rmdir()
        raise


def require_space(folder: Path, needed: int) -> None:
    """Raise InputError when the file system of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.2f} GB free, but the run needs up to {needed / 1e9:.2f} GB; free some space or"
            " choose another --out"
        )


def write_part(file: Path, tensors: dict[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, and `notes` beside them, to `file`: durable and whole when this returns, else as it was before.

    Raises RunError.
    """
    temporary = file.with_suffix(".tmp")
    with disk_errors(file):
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt", **(notes or {})},
        )
        commit(temporary, file)


def read_part(file: Path) -> dict[str, Tensor]:
    """The tensors of a part this run wrote earlier."""
    return load_file(file)


def write_shards(tensors: dict[str, TensorInfo], folder: Path, max_shard_bytes: int, stem: str = WEIGHTS_STEM) -> None:
    """Copy `tensors` (name -> where the bytes lie now) into shards of `folder`, in order, and write their index.

    A shard holds at most `max_shard_bytes` of tensors, or one tensor; `stem` begins its name. Bytes are copied, never
    loaded.
    """
    shards: list[dict[str, TensorInfo]] = []
    filled = 0
    for name, info in tensors.items():
        if not shards or filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with disk_errors(file):
            _copy_tensors(members, file)
        weight_map.update(dict.fromkeys(members, file.name))
    with disk_errors(folder):
        write_index(folder, weight_map, stem)


def write_stream(
    entries: Iterable[dict[str, Tensor]], others: dict[str, TensorInfo], folder: Path, stem: str
) -> dict[str, TensorInfo]:
    """Write shards of `others` and of tensors that come some at a time; returns where the latter lay on the way.

    Memory stays at one entry and some 256 MB; the disk holds the tensors twice while the shards are written.
    """
    waiting: dict[str, Tensor] = {}
    found: dict[str, TensorInfo] = {}
    parts: list[Path] = []

    def flush() -> None:
        parts.append(folder / f"part-{len(parts):05d}.safetensors")
        write_part(parts[-1], waiting)
        found.update(read_header(parts[-1]))
        waiting.clear()

    for tensors in entries:
        waiting.update(tensors)
        if sum(tensor.nbytes for tensor in waiting.values()) > _PART_BYTES:
            flush()
    if waiting:
        flush()
    write_shards({**others, **found}, folder, SHARD_BYTES, stem)
    for part in parts:
        part.unlink()
    return found


def _copy_tensors(tensors: dict[str, TensorInfo], file: Path) -> None:
    """Write one safetensors file from bytes that lie elsewhere."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        dtype = next(code for code, known in DTYPES.items() if known == info.dtype)
        header[name] = {"dtype": dtype, "shape": info.shape, "data_offsets": [offset, offset + info.nbytes]}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for info in tensors.values():
            with info.file.open("rb") as stream:
                stream.seek(info.start)
                left = info.nbytes
                while left:
                    piece = stream.read(min(left, _COPY_BYTES))
                    if not piece:
                        raise RunError(f"{info.file}: became shorter while it was being read; run the command again")
                    out.write(piece)
                    left -= len(piece)
    commit(temporary, file)


def companions(source: Path) -> list[Path]:
    """Tokenizer, generation settings and licence files of a checkpoint."""
    files = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in files if file.suffix not in (".safetensors", ".bin", ".pt", ".py"))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the `companions` of the dense checkpoint. Raises RunError."""
    with disk_errors(folder):
        for file in companions(source):
            shutil.copyfile(file, folder / file.name)


def publish(partial: Path, out: Path) -> None:
    """Rename the finished `partial` to `out`; an old `out` disappears only after its replacement is in place."""
    with disk_errors(out):
        old = out.with_name(out.name + ".replaced")
        if old.exists():
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync_folder(out.parent)
        if old.exists():
            shutil.rmtree(old)
