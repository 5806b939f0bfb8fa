"""Small Triton kernels for the tests of the interpreter, the meter, the compiler and the cost model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfweight.triton_kernels.launch import Launch


@triton.jit
def _scaled(x, factor):
    return x * factor


@triton.jit
def row_dot(w_ptr, x_ptr, y_ptr, rows, columns, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y[n] = 2 * sum_k w[n, k] x[k], the weights read once and past the caches."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        keep = (row[:, None] < rows) & (column[None, :] < columns)
        w = tl.load(w_ptr + row[:, None] * stride + column[None, :], keep, 0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + column, column < columns, 0.0, eviction_policy="evict_last")
        total += w.to(tl.float32) * x[None, :].to(tl.float32)
    tl.store(y_ptr + row, _scaled(tl.sum(total, 1), 2.0), row < rows)


@triton.jit
def overrun(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Copies without a mask: the last program reads and writes past the end."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def add_atomically(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y[0] += sum(x) over all programs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + at), 0), sem="relaxed")


@triton.jit
def assembly(a_ptr, b_ptr, c_ptr, y_ptr, SIZE: tl.constexpr, ASM: tl.constexpr, PACK: tl.constexpr, IN: tl.constexpr):
    """y = ASM(a, b, c), int32 tiles of SIZE; every operand takes PACK registers."""
    at = tl.arange(0, SIZE)
    operands = [tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at)]
    tl.store(y_ptr + at, tl.inline_asm_elementwise(ASM, IN, operands, dtype=tl.int32, is_pure=True, pack=PACK))


def row_dot_launch(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, block_n: int = 4, block_k: int = 256) -> Launch:
    """`w` `[N, K]`, `x` `[K]`, `y` `[N]` fp32."""
    rows, columns = w.shape
    return Launch(
        grid=(-(-rows // block_n),),
        arguments={"w_ptr": w, "x_ptr": x, "y_ptr": y, "rows": rows, "columns": columns, "stride": w.stride(0)},
        constants={"BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=1,
    )
