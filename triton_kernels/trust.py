"""Which kernels may run on which device: facts learned there, kept for the life of the process.

A kernel that was proven only without hardware can still be wrong on it. `dispatch.verify` runs kernels against their
references on the device and records the outcome here; a kernel that disagreed never runs again in this process, and one
with inline assembly does not run before it has agreed.
"""

from __future__ import annotations

import threading

import torch

_outcomes: dict[tuple[str, str], tuple[bool, str]] = {}
_lock = threading.Lock()


def may_run(kernel: str, device: torch.device, inline_asm: bool = False) -> tuple[bool, str]:
    """Whether `kernel` (such as `two_four.select`) may run on `device`, and why not."""
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


def forget() -> None:
    """Forget every outcome."""
    with _lock:
        _outcomes.clear()
