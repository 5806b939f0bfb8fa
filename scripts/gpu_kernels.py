"""Triton kernels that gpu_suite.py calibrates the cost model with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chase(ring_ptr, out_ptr, steps):
    """Follow `ring[i]` for `steps` dependent loads: the time per load is the latency of memory."""
    at = tl.load(out_ptr)
    for _ in range(steps):
        at = tl.load(ring_ptr + at)
    tl.store(out_ptr, at)


@triton.jit
def nothing(out_ptr):
    """As little as a launch can do."""
    tl.store(out_ptr, 0)
