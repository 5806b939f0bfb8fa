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


def release_memory() -> None:
    """Return freed heap to the system. glibc keeps it otherwise, and block after block the process would grow."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
