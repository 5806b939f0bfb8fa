"""A disk that fails: the n-th operation that changes something below a folder raises, as a full or lost disk would."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from halfweight.compress import writer


class FailingDisk:
    """Counts every opening for writing, write, sync, rename and saved part below `folder`; raises at number `at`."""

    def __init__(self, folder: Path, code: int, at: int | None) -> None:
        self.folder, self.code, self.at, self.count = str(folder), code, at, 0

    def next(self, path: Any) -> bool:
        """Count an operation on `path`; whether it is the one to fail."""
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.folder):
            return False
        self.count += 1
        return self.count == self.at

    def error(self, path: Any) -> OSError:
        return OSError(self.code, os.strerror(self.code), os.fspath(path))


class _Stream:
    """A file open for writing, whose failing write leaves half of its data behind."""

    def __init__(self, stream: Any, path: Any, disk: FailingDisk) -> None:
        self._stream, self._path, self._disk = stream, path, disk

    def write(self, data: Any) -> Any:
        if self._disk.next(self._path):
            self._stream.write(data[: len(data) // 2])
            raise self._disk.error(self._path)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._stream.close()


@contextmanager
def failing_disk(folder: Path, code: int = errno.ENOSPC, at: int | None = None) -> Iterator[FailingDisk]:
    """Within the `with`, operation number `at` below `folder` fails with `code`; None only counts them."""
    disk, names = FailingDisk(folder, code, at), {}
    real_open, real_save = io.open, writer.save_file

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            stream = real_open(file, mode, *arguments, **options)
            names[stream.fileno()] = file
            return stream
        if disk.next(file):
            raise disk.error(file)
        stream = real_open(file, mode, *arguments, **options)
        names[stream.fileno()] = file
        return _Stream(stream, file, disk)

    def save(tensors: Any, file: Path, *arguments: Any) -> None:
        real_save(tensors, file, *arguments)
        if disk.next(file):
            os.truncate(file, file.stat().st_size // 2)
            message = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
            raise SafetensorError(message)  # it is written in Rust and has no errno

    def fsync(handle: int) -> None:
        if disk.next(names.get(handle, folder)):
            raise disk.error(folder)  # and never syncs for real: nothing here outlives the process

    def renaming(rename: Callable[..., Any]) -> Callable[..., Any]:
        def renamed(source: Any, target: Any, **options: Any) -> Any:
            if disk.next(target):
                raise disk.error(target)
            return rename(source, target, **options)

        return renamed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        patch.setattr(writer, "save_file", save)
        patch.setattr(os, "fsync", fsync)
        for name in ("rename", "replace"):
            patch.setattr(os, name, renaming(getattr(os, name)))
        yield disk
