"""Which kernels may run on which device: facts learned there, kept for the life of the process.

A kernel that was proven only without hardware can still be wrong on it. `dispatch.verify` runs kernels against their
references on the device and records the outcome here; a kernel that disagreed never runs again in this process, and one
with inline assembly runs only for the numbers of tokens for which its code has agreed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_outcomes: dict[tuple[str, str], tuple[bool, str]] = {}
_agreed: set[tuple[str, str, int]] = set()  # kernel, device, and tokens as in `_variant`
_lock = threading.Lock()
_assumed: ContextVar[tuple[str, bool] | None] = ContextVar("assumed", default=None)


def may_run(kernel: str, device: torch.device, inline_asm: bool = False, tokens: int | None = None) -> tuple[bool, str]:
    """Whether `kernel` (such as `two_four.select`) may run on `device`, and why not.

    With inline assembly it must have agreed with its reference there, for as many `tokens` (None: for any number).
    """
    assumed = _assumed.get()
    if assumed is not None and assumed[0] == kernel:
        return assumed[1], ""
    outcome = _outcomes.get((kernel, str(device)))
    if outcome is not None and not (inline_asm and outcome[0]):
        return outcome
    if not inline_asm or (outcome is not None and tokens is None):
        return True, ""
    if tokens is not None and (kernel, str(device), _variant(tokens)) in _agreed:
        return True, ""
    count = "" if tokens is None else f" for {tokens} tokens"
    return False, f"{kernel} has inline assembly and has not passed warmup's check{count} on {device}"


def record(kernel: str, device: torch.device, error: float, allowed: float, tokens: int) -> bool:
    """Note the relative RMS `error` of `kernel` against its reference for `tokens` on `device`; returns whether it is
    trusted."""
    passed = error <= allowed  # false for NaN
    reason = "" if passed else f"{kernel} disagrees with its reference on {device} (relative error {error:.1e})"
    with _lock:
        _outcomes[kernel, str(device)] = (passed, reason)
        if passed:
            _agreed.add((kernel, str(device), _variant(tokens)))
    return passed


def _variant(tokens: int) -> int:
    """Kernels are compiled for a power of two of tokens, from 8 for a multiple of 8: the most of the same code."""
    return 1 << (tokens - 1).bit_length() if tokens <= 8 else -(-tokens // 8) * 8


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
        _agreed.clear()
