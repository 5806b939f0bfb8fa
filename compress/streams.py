"""Activations of whole text sets: in memory, or in a file of which one batch at a time is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from ..serving.durable import disk_errors
from ..serving.errors import InputError, RunError
from .calibration import dev_windows
from .recipe import Recipe


class Stream(Sequence[Tensor]):
    """Batches of activations, each a tensor. Slices and sums of streams share their batches.

    A batch that is in a file is read anew whenever it is looked at, and changes by `store` alone.
    """

    def __init__(self, batches: Iterable[Tensor | _Spilled] = ()) -> None:
        self._batches = list(batches)

    @classmethod
    def in_file(cls, batches: Iterable[Tensor], folder: Path) -> Stream:
        """`batches`, taken one by one, in a file in `folder` that has no name and goes with the stream or the process,
        however that ends. Raises RunError when it cannot be written."""
        file = _File(folder)
        return cls([file.append(x) for x in batches])

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Stream: ...
    def __getitem__(self, index: int | slice) -> Tensor | Stream:
        if isinstance(index, slice):
            return Stream(self._batches[index])
        batch = self._batches[index]
        return batch.read() if isinstance(batch, _Spilled) else batch

    def __add__(self, other: Stream) -> Stream:
        return Stream([*self._batches, *other._batches])

    def store(self, index: int, x: Tensor) -> None:
        """Put `x`, of the same shape and dtype, in the place of a batch. Raises RunError when the file cannot be
        written."""
        batch = self._batches[index]
        if isinstance(batch, _Spilled):
            batch.write(x)
        else:
            batch.copy_(x)


class _File:
    """A file without a name. It is read and written, not mapped: mapped pages would count as this process's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        with disk_errors(folder):
            self.raw = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with this object

    def append(self, x: Tensor) -> _Spilled:
        batch = _Spilled(self, self.size, x)
        batch.write(x)
        self.size += x.nbytes
        return batch

    def __del__(self) -> None:
        if hasattr(self, "raw"):
            self.raw.close()


class _Spilled:
    """A place for tensors like `x` in a file."""

    def __init__(self, file: _File, start: int, x: Tensor) -> None:
        self.file, self.start = file, start
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device

    def read(self) -> Tensor:
        x = torch.empty(self.shape, dtype=self.dtype)
        left = _bytes(x)
        self.file.raw.seek(self.start)
        while left:
            done = self.file.raw.readinto(left)
            if not done:
                raise RunError(f"{self.file.folder}: activations written there are gone; run the same command again")
            left = left[done:]
        return x.to(self.device)

    def write(self, x: Tensor) -> None:
        left = _bytes(x.detach().contiguous().cpu())
        with disk_errors(self.file.folder):
            self.file.raw.seek(self.start)
            while left:
                left = left[self.file.raw.write(left) :]  # a disk that fills up takes a part first


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x.reshape(-1).view(torch.uint8).numpy().data


def stream_tokens(recipe: Recipe) -> tuple[int, int]:
    """Tokens that run through the compressed blocks (calibration and dev sets), and through the dense ones (dev)."""
    calibration = recipe.calibration
    tuning = 0 if recipe.tuning is None else recipe.tuning.samples or 0
    dev = dev_windows(calibration.samples, tuning) * calibration.seqlen
    return calibration.samples * calibration.seqlen + dev, dev


def tuning_tokens(recipe: Recipe) -> int:
    """Tokens whose activations are held for tuning beside `stream_tokens`: dense, and compressed ones to tune on."""
    if recipe.tuning is None:
        return 0
    samples = recipe.calibration.samples
    windows = max(samples, recipe.tuning.samples or 0)
    return (windows + (windows - samples if recipe.tuning.block is not None else 0)) * recipe.calibration.seqlen


def paused_numbers(hidden: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Numbers per token that a pass holds while it pauses in a block with linears of these `shapes`, `hidden` wide: the
    residual stream, the normed one, and the input it pauses at."""
    return 2 * hidden + max((k for _, k in shapes), default=0)


def stream_bytes(recipe: Recipe, hidden: int, itemsize: int) -> float:
    """Bytes of all streams, of `hidden` numbers of `itemsize` bytes per token."""
    return float((sum(stream_tokens(recipe)) + tuning_tokens(recipe)) * hidden * itemsize)


def activation_bytes(recipe: Recipe, shapes: Mapping[str, tuple[int, int]], hidden: int, itemsize: int) -> float:
    """Bytes of all activations in memory, while a model `hidden` wide with linears of these `shapes` is compressed by
    block: the streams, and what paused passes hold."""
    paused = stream_tokens(recipe)[0] * paused_numbers(hidden, shapes.values()) * itemsize
    return stream_bytes(recipe, hidden, itemsize) + paused


def spilled_bytes(recipe: Recipe, shapes: Mapping[str, tuple[int, int]], hidden: int, itemsize: int) -> float:
    """Bytes of the files that are there instead: the streams, and the inputs of the linear at work."""
    inputs = stream_tokens(recipe)[0] * max((k for _, k in shapes.values()), default=0) * itemsize
    return stream_bytes(recipe, hidden, itemsize) + inputs


def check_budget(budget: float | None) -> None:
    """Raise InputError for an activation memory, in 10^9 bytes, that is not above 0."""
    if budget is not None and not budget > 0:
        raise InputError(f"activation memory {budget:g}: must be more than 0 (GB); leave it out for no limit")
