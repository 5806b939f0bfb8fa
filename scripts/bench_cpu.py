"""Time the CPU kernels beside torch's own matrix-vector products.

    python scripts/bench_cpu.py [--n 4096] [--k 4096] [--threads 1 2] [--tokens 1] [--repeats 50] [--json FILE]

One line per kernel: median milliseconds, gigabytes per second of the bytes it has to read, and how many times faster it
is than torch's faster of fp32 and bf16. All kernels take turns within one run, so that a busy moment hits them alike,
and each walks through copies of its weight that together are much larger than the caches. Weights are random: speed
does not depend on them. Half of the inputs are selected, half of the groups kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from halfweight.triton_kernels.cpu import (
    group_int4,
    input_select,
    input_select_int4,
    int4,
    jit,
    matmul,
    two_four,
    two_four_int4,
)
from halfweight.triton_kernels.formats import groups, integers
from halfweight.triton_kernels.formats import two_four as two_four_format
from halfweight.triton_kernels.formats import two_four_int4 as two_four_int4_format
from halfweight.triton_kernels.formats.bits import to_bits
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.formats.integers import Quantized

ROTATED_BYTES = 192 << 20
KEPT = 0.5
RANK = 64


class Case(NamedTuple):
    """`run(weight)` reads `read` bytes of a weight that takes `size`."""

    name: str
    weight: Any
    run: Callable[[Any], Tensor]
    size: int
    read: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="outputs")
    parser.add_argument("--k", type=int, default=4096, help="inputs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    cases = make_cases(options.n, options.k, options.tokens)
    machine = jit.host()
    print(f"{options.n}x{options.k}, {options.tokens} token(s), {machine.cpu}, torch {torch.__version__}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += measure(cases, options.repeats, threads)
    if options.json:
        options.json.write_text(json.dumps({"cpu": machine.cpu, **{**vars(options), "json": None}, "rows": rows}))


def measure(cases: list[Case], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Medians of all cases taking turns; prints the table."""
    copies = {case.name: [_copy(case.weight) for _ in range(-(-ROTATED_BYTES // case.size))] for case in cases}
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(-2, repeats):
        for case in cases:
            # the turn before this one left other data in the caches; two calls to warm up what is not the weight
            weights = copies[case.name]
            case.run(weights[2 * turn % len(weights)])
            weight = weights[(2 * turn + 1) % len(weights)]
            start = time.perf_counter()
            case.run(weight)
            if turn >= 0:
                times[case.name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    dense = min(medians["torch fp32"], medians["torch bf16"])
    print(f"\n{'kernel':34} {'threads':>7} {'ms':>8} {'GB/s':>6} {'x dense':>8}")
    rows = []
    for case in cases:
        seconds = medians[case.name]
        row = {
            "kernel": case.name,
            "threads": threads,
            "ms": seconds * 1e3,
            "GB/s": case.read / seconds / 1e9,
            "speedup": dense / seconds,
        }
        rows.append(row)
        print(f"{case.name:34} {threads:7} {row['ms']:8.3f} {row['GB/s']:6.1f} {row['speedup']:8.2f}", flush=True)
    return rows


def make_cases(n: int, k: int, tokens: int) -> list[Case]:
    """torch's products and every kernel, for a weight `[n, k]`."""
    x = torch.randn(tokens, k)
    x16 = x.bfloat16()
    dense = torch.randn(n, k)
    cases = [
        Case("torch fp32", dense, lambda w: F.linear(x, w), n * k * 4, n * k * 4),
        Case("torch bf16", dense.bfloat16(), lambda w: F.linear(x16, w), n * k * 2, n * k * 2),
        *_torch_int4(n, k, x16),
    ]
    mask = (torch.rand(n, k // 4, 4).argsort(-1).argsort(-1) < 2).flatten(1)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        packed = two_four_format.pack(torch.where(mask, dense, 0.0).to(dtype))
        cases.append(_rows_case(f"2:4 {name}", two_four.prepare(*packed), two_four, x16))
    for group_size in (128, 32):
        kept = two_four_int4_format.pack(_quantized(n, k, 4, group_size), mask, group_size=group_size)
        weight = two_four_int4.prepare(kept, group_size=group_size, columns=k)
        cases.append(_rows_case(f"2:4 int4 g{group_size}", weight, two_four_int4, x16))
    for bits, group_size in ((4, 128), (4, 32), (8, 128)):
        codes = integers.pack(_quantized(n, k, bits, group_size), bits=bits, group_size=group_size)
        dense_int = int4.prepare(codes, bits=bits, group_size=group_size, columns=k)
        cases.append(_rows_case(f"int{bits} g{group_size}", dense_int, int4, x16))
    for size in groups.SIZES:
        weight_groups = group_int4.prepare(_groups(n, k, size), k)
        cases.append(_rows_case(f"group int4 g{size} {KEPT:.0%}", weight_groups, group_int4, x16))
    return cases + _selected_cases(n, k, x16, dense)


def _torch_int4(n: int, k: int, x: Tensor) -> list[Case]:
    """torch's own dense int4 for CPUs, groups of 128."""
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    weight = pack(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales = torch.rand(k // 128, n, 2).bfloat16()
    size = n * k // 2 + scales.numel() * 2
    return [Case("torch int4 g128", weight, lambda w: run(x, w, 128, scales), size, size)]


def _selected_cases(n: int, k: int, x: Tensor, dense: Tensor) -> list[Case]:
    threshold = x.float().abs().flatten().kthvalue(round(x.numel() * (1 - KEPT))).values.view(1)
    plain = InputSelection(to_bits(threshold))
    branch = plain._replace(V=torch.randn(1, k, RANK).bfloat16(), U=torch.randn(n, RANK).bfloat16())
    kept = float((x.float().abs() > threshold).any(0).float().mean())
    label = f"{kept:.0%}"
    transposed = dense.T.bfloat16().contiguous()
    codes = integers.pack(_quantized(k, n, 4, 128), bits=4, group_size=128)
    size = 16
    prepared = [
        (f"inputs bf16 {label}", input_select.prepare(transposed, plain)),
        (f"inputs bf16 {label}, rank {RANK}", input_select.prepare(transposed, branch)),
        (f"inputs int4 g128 {label}", input_select_int4.prepare([codes], plain, [n], bits=4, group_size=128)),
        (f"inputs group int4 {label}", input_select_int4.prepare_groups([_groups(k, n, size)], plain, [n])),
    ]
    cases = []
    for name, weight in prepared:
        total = matmul.weight_bytes(weight.weight)
        read = kept * total
        if weight.selection.V is not None:
            read += RANK * ((1 - kept) * k + n) * 2
        cases.append(Case(name, weight, lambda w: input_select.linear(x, w), total, read))
    return cases


def _rows_case(name: str, weight: Any, module: Any, x: Tensor) -> Case:
    size = matmul.weight_bytes(module.rows(weight))
    return Case(name, weight, lambda w: module.linear(x, w), size, size)


def _quantized(rows: int, columns: int, bits: int, group_size: int) -> Quantized:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    return Quantized(codes, torch.rand(rows, -(-columns // group_size)).half(), None)


def _groups(rows: int, columns: int, size: int) -> groups.Groups:
    total = columns // size
    kept = round(total * KEPT)
    numbers = torch.rand(rows, total).argsort(-1)[:, :kept].sort(-1).values
    codes = torch.randint(0, 16, (rows, kept, size), dtype=torch.uint8)
    return groups.pack(groups.KeptGroups(codes, torch.rand(rows, kept).half(), None, numbers), columns)


def _copy(weight: Any) -> Any:
    """A copy of a tensor, or of every tensor in nested tuples."""
    if isinstance(weight, Tensor):
        return weight.clone()
    if isinstance(weight, tuple):
        items = [_copy(item) for item in weight]
        return type(weight)(*items) if hasattr(weight, "_fields") else tuple(items)
    return weight


if __name__ == "__main__":
    main()
