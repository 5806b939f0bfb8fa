"""TEAL's sparse GEMV, written again from its description: the rival of `input_select` for one token.

One program handles one tile of W^T `[K, N]`: it loads the tile's inputs, masks the rows whose |x| is at or under the
threshold (masked rows are not fetched), sums over the tile and adds the sums atomically to y in x's dtype. y is zeroed
by another launch before, for every call.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sparse_gemv(x_ptr, w_ptr, y_ptr, threshold, N, K, stride_w, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """`y[n] += sum over the tile's k with |x[k]| > threshold of x[k] W^T[k, n]`."""
    row = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row, mask=row < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
    pointers = w_ptr + row[:, None] * stride_w + column[None, :]
    w = tl.load(pointers, mask=(tl.abs(x) > threshold)[:, None], other=0.0, eviction_policy="evict_first")
    total = tl.sum(w.to(tl.float32) * x[:, None], 0)
    tl.atomic_add(y_ptr + column, total.to(y_ptr.dtype.element_ty), mask=column < N, sem="relaxed")
