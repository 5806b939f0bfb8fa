"""Which kernels may run on which device: facts learned there, kept for the life of the process.

A kernel that was proven only without hardware can still be wrong on it. `dispatch.verify` runs kernels against their
references on the device and records the outcome here; a kernel that disagreed never runs again in this process, and one
with inline assembly does not run before it has agreed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_outcomes: dict[tuple[str, str], tuple[bool, str]] = {}
_lock = threading.Lock()
_assumed: ContextVar[tuple[str, bool] | None] = ContextVar("assumed", default=None)


def may_run(kernel: str, device: torch.device, inline_asm: bool = False) -> tuple[bool, str]:
    """Whether `kernel` (such as `two_four.select`) may run on `device`, and why not."""
    assumed = _assumed.get()
    if assumed is not None and assumed[0] == kernel:
        return assumed[1], ""
    outcome = _outcomes.get((kernel, str(device)))
    if outcome is not None:
        return outcome
    if inline_asm:
        return False, f"{kernel} has inline assembly and has not passed warmup's check on {device}"
    return True, ""


def record(kernel: str, device: torch.device, error: float, allowed: float) -> bool:
    """Note the relative RMS `error` of `kernel` against its reference on `device`; returns whether it is trusted."""
    passed = error <= allowed  # false for NaN
    reason = "" if passed else f"{kernel} disagrees with its reference on {device} (relative error {error:.1e})"
    with _lock:
        _outcomes[kernel, str(device)] = (passed, reason)
    return passed


def refuse(kernel: str, device: torch.device, reason: str) -> None:
    """Never run `kernel` on `device`."""
    with _lock:
        _outcomes[kernel, str(device)] = (False, reason)


@contextlib.contextmanager
def assume(kernel: str, allowed: bool) -> Iterator[None]:
    """Within the context, whether `kernel` may run is known: how it is checked, and how others are without it."""
    token = _assumed.set((kernel, allowed))
    try:
        yield
    finally:
        _assumed.reset(token)


def forget() -> None:
    """Forget every outcome."""
    with _lock:
        _outcomes.clear()
