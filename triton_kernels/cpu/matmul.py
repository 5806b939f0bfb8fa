"""Calls of the K-major kernels: some tokens through the fused kernel, many through dense blocks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weight import Linear
from . import jit

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_TOKENS = 8  # of one call of a kernel
BLOCK_BYTES = 4 << 20


class Rows(NamedTuple):
    """A prepared K-major weight `[n, k]`, as the programs of `rows.py` take it.

    `decoder` and `config` name the program. A row of activations is cut into runs of `span` numbers that the layout
    keeps `stride` apart, `padded` in all. `tensors` are the decoder's, None for an absent one; `exact` is the
    narrowest dtype that holds every weight.
    """

    decoder: str
    config: tuple[int, ...]
    n: int
    k: int
    span: int
    stride: int
    padded: int
    tensors: tuple[Tensor | None, ...]
    exact: torch.dtype = torch.float32


def linear(rows: Rows) -> Linear:
    """The function of `x` `[..., k]` (fp32, bf16 or fp16) and `bias` (`[n]` or None) that gives `x @ W^T + bias`
    `[..., n]` in x's dtype, summed in fp32.

    Up to `fused_tokens` the result of one token depends on it alone, bit for bit: not on the others, nor on the number
    of threads. Beyond that, weights are rounded to bf16 when x is. Other activations are a ValueError.
    """
    # It is called for every linear of every token: what does not change is computed here.
    n, k = rows.n, rows.k
    fused, work = max(MAX_TOKENS, fused_tokens(rows)), main_bytes(rows)
    fixed = (n, k, rows.span, rows.stride, rows.padded, *_addresses(rows))

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        shape, kind = x.shape, DTYPES.get(x.dtype)
        if shape[-1] != k or kind is None:
            raise ValueError(f"activations must be fp32, bf16 or fp16 [..., {k}], got {x.dtype} {list(shape)}")
        tokens = x.numel() // k
        x = x.contiguous()
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        if tokens > fused:
            return _dense_linear(rows, x.reshape(tokens, k), bias).view(*shape[:-1], n)
        y = x.new_empty((*shape[:-1], n))
        if n == 0:
            return y
        source, target, size = x.data_ptr(), y.data_ptr(), x.element_size()
        where = 0 if bias is None else bias.data_ptr()
        for first in range(0, tokens, MAX_TOKENS):
            count = min(tokens - first, MAX_TOKENS)
            kernel = jit.kernel("rows", "linear", rows.decoder, rows.config, count)
            at = (source + first * k * size, target + first * n * size)
            jit.run(kernel, work, *at, where, kind, count, *fixed)
        return y

    return run


def fused_tokens(rows: Rows) -> int:
    """Tokens up to which passes of the kernel, 8 at a time, take less time than expanding the weight for one matmul.

    A pass costs in proportion to the kept weights, expanding to all of them: at 4096x4096 int4 and 2:4 break even at
    about 16 tokens, groups of which half are kept at 32 to 48 (scripts/bench_cpu.py --tokens).
    """
    if rows.decoder != "groups":
        return 2 * MAX_TOKENS
    kept = 2 * main_bytes(rows) / max(1, rows.n * rows.k)
    return MAX_TOKENS * min(8, round(2 / max(kept, 0.25)))


def dense_rows(rows: Rows, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's rows `numbers` (int64) as `[..., k]`; raises IndexError for one that does not exist."""
    flat = numbers.reshape(-1).contiguous()
    y = torch.empty(len(flat), rows.k, dtype=dtype)
    if len(flat):
        kernel = jit.kernel("rows", "expand", rows.decoder, rows.config)
        sizes = (len(flat), rows.n, DTYPES[dtype], rows.k, rows.span, rows.stride, rows.padded)
        jit.run(kernel, 4 * y.numel(), y.data_ptr(), flat.data_ptr(), *sizes, *_addresses(rows))
    return y.view(*numbers.shape, rows.k)


def main_bytes(rows: Rows) -> int:
    """Bytes of the weight's codes or values: a measure of the work, quick to get."""
    return 0 if rows.tensors[0] is None else rows.tensors[0].nbytes


def weight_bytes(rows: Rows) -> int:
    """Bytes of the weight that one pass reads."""
    return sum(t.numel() * t.element_size() for t in rows.tensors if t is not None)


def _dense_linear(rows: Rows, x: Tensor, bias: Tensor | None) -> Tensor:
    """The dense matmul, a block of rows at a time; in fp32 unless x is bf16 or its dtype holds the weights exactly."""
    dtype = x.dtype if x.dtype in (rows.exact, torch.bfloat16) else torch.float32
    wide, y = x.to(dtype), x.new_empty(len(x), rows.n)
    step = max(1, BLOCK_BYTES // (dtype.itemsize * max(1, rows.k)))
    for start in range(0, rows.n, step):
        block = slice(start, min(start + step, rows.n))
        dense = dense_rows(rows, torch.arange(block.start, block.stop), dtype)
        y[:, block] = F.linear(wide, dense, None if bias is None else bias[block].to(dtype))
    return y


def _addresses(rows: Rows) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in rows.tensors]
