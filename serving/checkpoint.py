"""Reading checkpoints from disk: headers first, tensors one at a time, nothing trusted.

Tensors are read with plain file reads instead of a memory map, so that resident memory is what the caller holds and
nothing else, and converted to the wanted dtype in bounded pieces.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .scheme import QUANT_METHOD, ArtifactConfig

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Own file names, so that transformers without halfweight finds no weights and stops, instead of filling the
# compressed linears with random numbers (it skips a quantization method it does not know).
WEIGHTS_STEM = "halfweight"
INDEX_NAME = f"{WEIGHTS_STEM}.safetensors.index.json"

_MAX_HEADER = 100_000_000  # the safetensors format's own limit, in bytes
_PIECE = 8 * 2**20  # bytes converted at a time


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `nbytes` are byte offsets in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, from its header alone; raises InputError when the file cannot be whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise InputError(f"{file}: truncated or not a safetensors file ({size} bytes); download it again")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise InputError(f"{file}: tensor {name} has unsupported dtype {entry['dtype']}")
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            start, end = entry["data_offsets"]
            if min((*shape, start), default=0) < 0 or end - start != prod(shape) * dtype.itemsize:
                raise InputError(f"{file}: header of tensor {name} contradicts itself; download it again")
            if 8 + length + end > size:
                raise InputError(
                    f"{file}: truncated: tensor {name} ends at byte {8 + length + end} but the file has {size};"
                    " download it again"
                )
            tensors[name] = TensorInfo(file, dtype, shape, 8 + length + start, end - start)
        end = 8 + length
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if info.start != end:  # the format allows neither holes nor overlaps
                raise InputError(f"{file}: header of tensor {name} contradicts itself; download it again")
            end += info.nbytes
        return tensors
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the checkpoint's index names it") from None
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a readable safetensors file ({error})") from None


class Checkpoint:
    """A Hugging Face folder of safetensors, dense or compressed. Opening it reads config.json and shard headers only.

    Attributes: `path`, `config` (the parsed config.json), `tensors` (name -> TensorInfo).
    """

    def __init__(self, path: str | Path) -> None:
        """Raises InputError when the folder, its config, its index or a shard is missing or damaged."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._shards():
            self.tensors.update(read_header(file))
        if not self.tensors:
            raise InputError(f"{self.path}: no tensors in the checkpoint")

    def _shards(self) -> list[Path]:
        for index_name in (INDEX_NAME, "model.safetensors.index.json"):
            index = self.path / index_name
            if index.is_file():
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise InputError(f"{index}: no weight_map")
                names = sorted({str(name) for name in weight_map.values()})
                if any(Path(name).name != name for name in names):
                    raise InputError(f"{index}: weight_map names a file outside the folder")
                return [self.path / name for name in names]
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        raise InputError(f"{self.path}: no safetensors weights (looked for {INDEX_NAME} and model.safetensors)")

    @cached_property
    def artifact(self) -> ArtifactConfig | None:
        """The validated `quantization_config`, or None for a dense checkpoint."""
        section = self.config.get("quantization_config")
        if section is None:
            return None
        method = section.get("quant_method") if isinstance(section, dict) else None
        if method != QUANT_METHOD:
            raise InputError(
                f"{self.path}: quantized with {method!r}; halfweight needs an unquantized checkpoint or its own"
            )
        return ArtifactConfig.parse(section, str(self.path / "config.json"))

    def stamp(self, times: bool = True) -> str:
        """Tells this checkpoint from others without reading weights: config, tensor headers, shard sizes and, where
        copies are not to pass for each other, `times`."""
        lines = [json.dumps(self.config, sort_keys=True)]
        for name, info in sorted(self.tensors.items()):
            stat = info.file.stat()
            time = stat.st_mtime_ns if times else ""
            lines.append(f"{name} {info.dtype} {info.shape} {info.start} {stat.st_size} {time}\n")
        return "".join(lines)

    def with_tensors(self, tensors: dict[str, TensorInfo]) -> Checkpoint:
        """This checkpoint with some of its tensors in other places."""
        changed = copy.copy(self)
        changed.tensors = {**self.tensors, **tensors}
        return changed

    def info(self, name: str) -> TensorInfo:
        """Header entry of tensor `name`; raises InputError when the checkpoint lacks it."""
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: tensor {name} is missing from the checkpoint") from None

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        rows: slice | None = None,
    ) -> Tensor:
        """Tensor `name`, or some of its `rows` (`slice(start, stop)`), in its own dtype or cast to `dtype`.

        Needs the result's memory plus one small piece.
        """
        return read_tensor(name, self.info(name), dtype, device, rows)


def read_tensor(
    name: str,
    info: TensorInfo,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rows: slice | None = None,
) -> Tensor:
    """The tensor at `info`, called `name` in errors; see `Checkpoint.read`."""
    shape, skipped = info.shape, 0
    if rows is not None:
        shape, skipped = (rows.stop - rows.start, *shape[1:]), rows.start * prod(shape[1:]) * info.dtype.itemsize
    out = torch.empty(prod(shape), dtype=dtype or info.dtype, device=device)
    step = max(1, _PIECE // info.dtype.itemsize)
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start + skipped)
            for begin in range(0, out.numel(), step):
                piece = torch.empty(min(step, out.numel() - begin), dtype=info.dtype)
                buffer = piece.view(torch.uint8).numpy().data
                if stream.readinto(buffer) != len(buffer):
                    raise InputError(f"{info.file}: tensor {name} ends early; download the file again")
                out[begin : begin + len(piece)] = piece
    except OSError as error:
        raise InputError(f"{info.file}: cannot read tensor {name} ({error.strerror})") from None
    return out.view(shape)


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object; raises InputError naming the file when it is missing, unreadable or not an object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; is {file.parent} a Hugging Face checkpoint?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a JSON object")
    return data
