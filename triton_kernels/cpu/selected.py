"""Calls of the input-major kernels: a few tokens through the fused kernel, more through masked dense matmuls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.bits import from_bits
from ..formats.input_select import InputSelection
from ..input_select import reference
from . import jit, matmul
from .matmul import DTYPES, MAX_TOKENS, Rows


class Selection(NamedTuple):
    """What P fused parts read. `thresholds[P]` and `norms[P, K]` fp32; `V[P, K, r]` and `U[r, columns]` transposed;
    `counts[P]` int32 in place of the thresholds."""

    thresholds: Tensor | None
    norms: Tensor | None
    V: Tensor | None
    U: Tensor | None
    counts: Tensor | None


class Columns(NamedTuple):
    """A prepared input-major weight, as the programs of `columns.py` take it.

    `weight` is W^T, its rows `columns` wide; P parts with equal numbers of rows may lie one under the other (groups) or
    be joined side by side. `parts[P, 4]` int64: first column, end, first output and number of outputs of each part.
    Outputs are cut into runs of `weight.span` that lie `weight.stride` columns apart.
    """

    weight: Rows
    k: int
    n: int
    parts: Tensor
    selection: Selection


def select_inputs(selection: InputSelection, parts: Tensor, columns: int, span: int, stride: int) -> Selection:
    """The tensors of `formats.input_select`, which must have passed its `validate`, in the CPU layout."""
    U = selection.U
    if U is not None:
        wide = U.new_zeros(U.shape[1], columns)
        wide[:, output_columns(parts, span, stride)] = U.T
        U = wide
    norms = None if selection.norms is None else from_bits(selection.norms)
    V = None if selection.V is None else selection.V.contiguous()
    thresholds = None if selection.thresholds is None else from_bits(selection.thresholds)
    return Selection(thresholds, norms, V, U, selection.counts)


def part_table(widths: Sequence[int], padded: Sequence[int]) -> Tensor:
    """`parts` for linears of `widths` outputs that take `padded` columns each, side by side."""
    rows, column, output = [], 0, 0
    for width, taken in zip(widths, padded, strict=True):
        rows.append((column, column + taken, output, width))
        column, output = column + taken, output + width
    return torch.tensor(rows, dtype=torch.int64)


def output_columns(parts: Tensor, span: int, stride: int) -> Tensor:
    """int64 `[n]`: the column of the CPU layout that holds each output."""
    columns = []
    for start, _, _, width in parts.tolist():
        output = torch.arange(width)
        columns.append(start + output // span * stride + output % span)
    return torch.cat(columns)


def linear(prepared: Columns, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x` `[..., k]` (fp32, bf16 or fp16) -> `[..., n]` in x's dtype, summed in fp32; `bias` `[n]` or None.

    Part p's outputs are `select(x) @ W^T + (x - select(x)) @ V[p] @ U^T + bias`. Rows of W^T that no token selects are
    not read. Up to 8 tokens the result of one depends on it alone, bit for bit: not on the others, nor on the number
    of threads.
    """
    if x.shape[-1] != prepared.k or x.dtype not in DTYPES:
        raise ValueError(f"activations must be fp32, bf16 or fp16 [..., {prepared.k}], got {x.dtype} {list(x.shape)}")
    tokens = x.numel() // prepared.k
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if tokens > MAX_TOKENS:
        return _dense_linear(prepared, x.reshape(tokens, prepared.k), bias).view(*x.shape[:-1], prepared.n)
    y = x.new_empty((*x.shape[:-1], prepared.n))
    if tokens and prepared.n:
        weight, (_, norms, V, U, _) = prepared.weight, prepared.selection
        thresholds = token_thresholds(prepared, x.view(tokens, prepared.k))
        branch = -1 if V is None else DTYPES[V.dtype]
        kernel = jit.kernel("columns", "linear", weight.decoder, weight.config, branch, tokens)
        addresses = (0 if t is None else t.data_ptr() for t in (thresholds, norms, V, U))
        jit.run(
            kernel,
            matmul.main_bytes(weight),
            *(x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), DTYPES[x.dtype]),
            *(tokens, prepared.n, prepared.k, weight.padded, weight.span, weight.stride),
            *(prepared.parts.data_ptr(), len(prepared.parts), *addresses, 0 if U is None else len(U)),
            thresholds.stride(0) * thresholds.itemsize,
            *(0 if t is None else t.data_ptr() for t in weight.tensors),
        )
    return y


def token_thresholds(prepared: Columns, x: Tensor) -> Tensor:
    """fp32 `[M, P]`, rows contiguous: what the scores of each token of `x` `[M, k]` must exceed, by part."""
    thresholds, norms, _, _, counts = prepared.selection
    if counts is None:
        assert thresholds is not None  # it has these or counts
        return thresholds.expand(len(x), -1)
    size = x.float().abs()
    parts = [
        reference.token_cuts(size if norms is None else size * norms[part], count)
        for part, count in enumerate(counts.tolist())
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _dense_linear(prepared: Columns, x: Tensor, bias: Tensor | None) -> Tensor:
    """Masked activations times dense blocks of rows of W^T, in fp32; or times a W^T of x's dtype as it is stored."""
    weight, (_, norms, V, U, _) = prepared.weight, prepared.selection
    thresholds = token_thresholds(prepared, x)
    stored = weight.tensors[0] if weight.decoder == "plain" else None
    if stored is not None and V is None and x.dtype == stored.dtype != torch.float16:  # fp16 is slow on most CPUs
        return _stored_linear(prepared, stored, x, thresholds, bias)
    wide = x.float()
    sums = wide.new_zeros(len(x), weight.padded)
    step = max(1, matmul.BLOCK_BYTES // (4 * max(1, weight.padded)))
    for p, (start, stop, _, _) in enumerate(prepared.parts.tolist()):
        unread = _unread(wide, norms, thresholds, p)
        selected = wide.masked_fill(unread, 0.0)
        for first in range(0, prepared.k, step):
            rows = slice(first, min(first + step, prepared.k))
            sums[:, start:stop].addmm_(selected[:, rows], _dense_rows(prepared, p, rows)[:, start:stop])
        if V is not None and U is not None:
            rest = wide.masked_fill(~unread, 0.0)
            sums[:, start:stop].addmm_(rest @ V[p].float(), U[:, start:stop].float())
    y = sums[:, output_columns(prepared.parts, weight.span, weight.stride)]
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _stored_linear(prepared: Columns, stored: Tensor, x: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    """Masked activations times `stored`, W^T `[k, columns]`; no score is below a negative threshold, nor masked."""
    everything, norms = bool((thresholds < 0).all()), prepared.selection.norms
    blocks = [
        (x if everything else x.masked_fill(_unread(x.float(), norms, thresholds, p), 0.0)) @ stored[:, start:stop]
        for p, (start, stop, _, _) in enumerate(prepared.parts.tolist())
    ]
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return y if bias is None else y + bias


def _unread(x: Tensor, norms: Tensor | None, thresholds: Tensor, part: int) -> Tensor:
    """bool `[M, k]`: the inputs of fp32 `x` `[M, k]` that a part does not read."""
    size = x.abs() if norms is None else x.abs() * norms[part]
    return size <= thresholds[:, part, None]


def _dense_rows(prepared: Columns, part: int, rows: slice) -> Tensor:
    """Rows of W^T in fp32, all columns; the part matters where parts lie one under the other."""
    weight, k = prepared.weight, prepared.k
    if weight.decoder == "plain":
        (dense,) = weight.tensors
        assert dense is not None
        return dense[rows].float()
    offset = part * k if weight.n > k else 0
    return matmul.dense_rows(
        weight._replace(k=weight.padded, span=weight.stride),
        torch.arange(rows.start, rows.stop) + offset,
        torch.float32,
    )
