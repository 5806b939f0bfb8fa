"""Sparse deltas: what a fine-tune changed of its base, losslessly, and the fine-tune again from the two.

A delta is a folder with everything of the fine-tune but its weights, and `delta-0000i-of-0000n.safetensors` with an
index. Of a tensor NAME of the fine-tune they hold

- nothing, when the base has the same bits;
- `NAME.bitmap` uint8 `[ceil(n / 8)]` and `NAME.values`, where some of its n numbers differ: bit i % 8 of byte i // 8
  says whether number i does (in row-major order), and `values` are those numbers of the fine-tune, in order;
- `NAME.whole`, when that takes no more bytes, or the base has no such tensor of that shape and dtype.

`delta.json` carries the version, the names of all tensors, and a SHA-256 of the base's: another base is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from ...serving.checkpoint import INDEX_NAME, Checkpoint, TensorInfo, read_header, read_json, read_tensor
from ...serving.durable import write_text
from ...serving.errors import InputError
from .. import writer
from ..report import OnProgress, Progress, silent
from .job import new_folder

DELTA = "delta.json"
VERSION = 1
_STEM = "delta"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DeltaReport(BaseModel):
    """`changed` of `numbers` numbers differ, in `tensors` tensors of which `equal` are equal; `bytes` is the size of
    the weights written, `tuned_bytes` that of the fine-tune's own."""

    base: str
    tuned: str
    out: str
    tensors: int
    equal: int
    numbers: int
    changed: int
    bytes: int
    tuned_bytes: int
    seconds: float


def make_delta(
    base: str | Path, tuned: str | Path, out: str | Path, *, overwrite: bool = False, progress: OnProgress = silent
) -> DeltaReport:
    """Write what the checkpoint `tuned` changed of `base` to the new folder `out`; both may be dense or compressed.

    Works tensor by tensor. Raises InputError for a damaged checkpoint and RunError when writing fails.
    """
    begin = time.monotonic()
    old, new = Checkpoint(base), Checkpoint(tuned)
    changed = equal = 0
    with new_folder(Path(out), overwrite) as folder:

        def entries() -> Iterator[dict[str, Tensor]]:
            nonlocal changed, equal
            for done, (name, info) in enumerate(new.tensors.items(), 1):
                progress(Progress("delta", done, len(new.tensors), name))
                found, count = _difference(name, old.tensors.get(name), info)
                changed += count
                equal += not found
                yield found

        written = writer.write_stream(entries(), {}, folder, _STEM)
        _copy_companions(new.path, folder)
        shutil.copyfile(new.path / "config.json", folder / "config.json")
        facts = {
            "delta_version": VERSION,
            "base_sha256": _sha256(old),
            "tensors": list(new.tensors),
            "stem": _stem(new),
        }
        write_text(folder / DELTA, json.dumps(facts, indent=2) + "\n")
    return DeltaReport(
        base=str(base),
        tuned=str(tuned),
        out=str(out),
        tensors=len(new.tensors),
        equal=equal,
        numbers=sum(prod(info.shape) for info in new.tensors.values()),
        changed=changed,
        bytes=sum(info.nbytes for info in written.values()),
        tuned_bytes=sum(info.nbytes for info in new.tensors.values()),
        seconds=time.monotonic() - begin,
    )


def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, overwrite: bool = False, progress: OnProgress = silent
) -> Path:
    """Rebuild the fine-tune of `base` that `delta` was made from, every tensor bit for bit, as the new folder `out`.

    Raises InputError for another base than the delta's, or a damaged delta.
    """
    old, path, out = Checkpoint(base), Path(delta), Path(out)
    facts = read_json(path / DELTA)
    if facts.get("delta_version") != VERSION:
        raise InputError(
            f"{path / DELTA}: delta_version {facts.get('delta_version')!r} is not supported, only {VERSION}"
        )
    if facts.get("base_sha256") != _sha256(old):
        raise InputError(f"{base}: is not the base that {path} was made from; its tensors differ")
    stored, names = _stored(path), facts.get("tensors")
    stem = facts.get("stem")
    if not isinstance(names, list) or stem not in ("model", "halfweight"):
        raise InputError(f"{path / DELTA}: lacks the tensors or the stem; the file is damaged")
    with new_folder(out, overwrite) as folder:

        def entries() -> Iterator[dict[str, Tensor]]:
            for done, name in enumerate(map(str, names), 1):
                progress(Progress("delta", done, len(names), name))
                yield {name: _rebuild(name, old, stored, path)}

        writer.write_stream(entries(), {}, folder, stem)
        _copy_companions(path, folder)
        shutil.copyfile(path / "config.json", folder / "config.json")
    return out


def _difference(name: str, old: TensorInfo | None, new: TensorInfo) -> tuple[dict[str, Tensor], int]:
    """What a delta stores for tensor `name`, and how many numbers that is."""
    tensor = read_tensor(name, new)
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return {f"{name}.whole": tensor}, tensor.numel()
    different = _bits(read_tensor(name, old)) != _bits(tensor)
    count = int(different.count_nonzero())
    if not count:
        return {}, 0
    bitmap = np.packbits(different.flatten().numpy(), bitorder="little")
    if bitmap.nbytes + count * tensor.itemsize >= tensor.nbytes:
        return {f"{name}.whole": tensor}, count
    return {f"{name}.bitmap": torch.from_numpy(bitmap), f"{name}.values": tensor[different]}, count


def _rebuild(name: str, base: Checkpoint, stored: dict[str, TensorInfo], path: Path) -> Tensor:
    if f"{name}.whole" in stored:
        return read_tensor(name, stored[f"{name}.whole"])
    tensor = base.read(name)
    if f"{name}.bitmap" not in stored:
        return tensor
    bitmap = read_tensor(name, stored[f"{name}.bitmap"])
    values = read_tensor(name, stored[f"{name}.values"]) if f"{name}.values" in stored else tensor.new_empty(0)
    n = tensor.numel()
    if bitmap.dtype == torch.uint8 and bitmap.shape == (-(-n // 8),):
        different = torch.from_numpy(np.unpackbits(bitmap.numpy(), count=n, bitorder="little")).bool()
        if values.dtype == tensor.dtype and values.shape == (int(different.count_nonzero()),):
            tensor.view(-1)[different] = values
            return tensor
    raise InputError(f"{path}: {name}: bitmap and values do not fit the base's tensor; the delta is damaged")


def _stored(path: Path) -> dict[str, TensorInfo]:
    index = path / f"{_STEM}.safetensors.index.json"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
        raise InputError(f"{index}: no weight_map, or it names a file outside the folder")
    return {name: info for file in sorted(set(weight_map.values())) for name, info in read_header(path / file).items()}


def _copy_companions(source: Path, folder: Path) -> None:
    writer.copy_companions(source, folder)
    for name in ("recipe.yaml", "report.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _stem(checkpoint: Checkpoint) -> str:
    return "halfweight" if (checkpoint.path / INDEX_NAME).is_file() else "model"


def _bits(tensor: Tensor) -> Tensor:
    """The numbers' bit patterns, so that -0 and NaN compare as what they are."""
    return tensor.view(_BITS[tensor.itemsize])


def _sha256(checkpoint: Checkpoint) -> str:
    """Hash of all tensors: names, dtypes, shapes and bytes, whatever files they lie in."""
    digest = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)} ".encode())
        facts: Any = read_tensor(name, info).contiguous().view(-1)
        digest.update(facts.view(torch.uint8).numpy().data if info.nbytes else b"")
    return digest.hexdigest()
