"""Resident memory: what this process reached, and giving freed memory back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path


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
