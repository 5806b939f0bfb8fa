"""Memory: what this process reached, giving freed memory back, and running out of it."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..serving.errors import HalfweightError, RunError

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def peak_rss_gb() -> float:
    """Peak resident memory of this process so far, in 10^9 bytes.

    Linux's `ru_maxrss` starts at the parent's size, so the kernel's own high-water mark is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def return_large_buffers() -> None:
    """Let freed buffers of 8 MB and more go back to the system at once, instead of leaving holes in glibc's heap."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD, which otherwise grows with what is freed


def release_memory() -> None:
    """Return freed heap to the system. glibc keeps it otherwise, and block after block the process would grow."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    )


@contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """Turn a failed allocation below into one RunError line that says `where`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, HalfweightError) or not is_out_of_memory(error):
            raise
        raise RunError(
            f"{where}: out of memory; finished blocks are kept, and the same command resumes where there is more;"
            " `halfweight plan` shows what a run needs, shorter windows (--seqlen) or fewer (--samples) need less"
        ) from None
