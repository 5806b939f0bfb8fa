"""Hold the decode kernels against GemLite's int4 GEMV and TEAL's sparse GEMV, all compiled here, without a GPU.

    python scripts/compare_rival_kernels.py --json rivals.json

For one token, at 4096 x 4096 and 14336 x 4096, for sm_80 and sm_90: thread instructions of the whole program per weight
(prologue and epilogue included, and every launch of ours; the rivals' zeroing launches are left out) and DRAM bytes.
The rivals are given their best configuration of all that their autotuners would try, by instructions alone, though
another may be faster; GemLite's own tuned configurations, where it ships one, are printed too.

GemLite is taken from its package, installed once (nothing of it is imported into this process):

    pip install --no-deps --target build/rivals gemlite

TEAL publishes no package; `peers/teal_kernel.py` is its algorithm written again. Inputs that are skipped cost
instructions in both kernels alike, so instructions are per weight, selected or not; bytes are at half of the inputs.
Exits with 1 when a rival wins a cell: instructions above 0.9 of the rival's, or bytes above 1.01 of its.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from peers import teal_kernel
from rich.console import Console
from rich.table import Table

from halfweight.triton_kernels import aot, registry
from halfweight.triton_kernels.launch import Launch, Shape
from halfweight.triton_kernels.survey import argument_bytes

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((4096, 4096), (14336, 4096))
TARGETS = ("sm_80", "sm_90")
DTYPES = (torch.float16, torch.bfloat16)
GROUP = 128
SHARE = 0.5  # of the inputs that a token uses
INSTRUCTIONS, BYTES = 0.9, 1.01  # of the rival's: what we must stay under


@dataclass(frozen=True)
class Cost:
    """Thread instructions per weight of a whole call, its DRAM bytes, and kernels or the rival's configuration."""

    instructions: float
    bytes: int
    how: str


@dataclass(frozen=True)
class Cell:
    """One comparison. `tuned`: the rival's instructions per weight in the configuration its authors measured best."""

    rival: str
    shape: tuple[int, int]
    target: str
    dtype: str
    ours: Cost
    theirs: Cost
    tuned: float | None = None

    @property
    def won(self) -> bool:
        """At least ten percent fewer instructions, and no more bytes."""
        fewer = self.ours.instructions <= INSTRUCTIONS * self.theirs.instructions
        return fewer and self.ours.bytes <= BYTES * self.theirs.bytes


def ours(op: str, shape: Shape, dtype: torch.dtype, target: str, share: float = 1.0) -> Cost:
    """What the operator launches for this linear, all launches together."""
    instructions, size, weights, names = 0.0, 0.0, 0, []
    for kernel, launch in registry.steps(op, shape, dtype, target):
        threads, weight_bytes = launch.programs * launch.num_warps * 32, kernel.weight_bytes(shape, dtype)
        sass = aot.compile_launch(kernel.jit(), launch, target).sass
        instructions += sass.instructions_per_thread(weight_bytes / threads) * threads
        size += kernel.bytes(shape, dtype) - (1 - share) * weight_bytes if weight_bytes else argument_bytes(launch)
        weights = max(weights, kernel.weights(shape))
        names.append(kernel.name)
    return Cost(instructions / weights, round(size), " + ".join(names))


def teal(n: int, k: int, dtype: torch.dtype, target: str) -> Cost:
    """TEAL's kernel in its best configuration. TEAL has fp16 only; for bf16, y is fp32 where bf16 has no atomics."""
    out = torch.float32 if dtype == torch.bfloat16 and target < "sm_90" else dtype
    tensors = [torch.empty(size, dtype=kind, device="meta") for size, kind in ((k, dtype), ((k, n), dtype), (n, out))]
    best: Cost | None = None
    for tile_k, tile_n, warps in product((16, 32, 64, 128), (128, 256, 512), (2, 4, 8)):
        arguments = dict(zip(("x_ptr", "w_ptr", "y_ptr"), tensors, strict=True))
        launch = Launch(
            (-(-n // tile_n), -(-k // tile_k)),
            {**arguments, "threshold": 0.5, "N": n, "K": k, "stride_w": n},
            {"BLOCK_K": tile_k, "BLOCK_N": tile_n},
            warps,
        )
        binary = aot.compile_launch(teal_kernel.sparse_gemv, launch, target)
        if binary.spills:
            continue
        count = len(binary.sass.instructions) * launch.programs * warps * 32 / (n * k)
        if best is None or count < best.instructions:
            size = round(SHARE * n * k * dtype.itemsize) + k * dtype.itemsize + n * out.itemsize
            best = Cost(count, size, f"{tile_k}x{tile_n}, {warps} warps")
    assert best is not None
    return best


def gemlite(folder: Path, n: int, k: int, dtype: torch.dtype, target: str) -> tuple[Cost, float | None]:
    """GemLite's kernel in its best configuration, and its instructions per weight in the one it ships for this GPU."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, ROOT / "scripts" / "peers" / "gemlite_kernels.py", target, name, GROUP, n, k]
    paths = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))
    child = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"GemLite's kernels did not compile: {child.stderr.strip().splitlines()[-1]}")
    rows = [row for row in json.loads(child.stdout.splitlines()[-1]) if not row["spills"]]
    best = min(rows, key=lambda row: row["instr_per_weight"])
    shipped = [row["instr_per_weight"] for row in rows if row["origin"] == "tuned"]
    size = n * k // 2 + n * k // GROUP * 2 + (n + k) * 2
    return Cost(best["instr_per_weight"], size, best["config"]), min(shipped, default=None)


def cells(folder: Path) -> Iterator[Cell]:
    """All comparisons; GemLite's processes run beside this one."""
    cases = [(*size, dtype, target) for size, target, dtype in product(SHAPES, TARGETS, DTYPES)]
    with ThreadPoolExecutor(2) as pool:
        children = [pool.submit(gemlite, folder, *case) for case in cases]
        selected = [_cell("TEAL", case, ours("input_select", *_linear(case), SHARE), teal(*case)) for case in cases]
        for case, child in zip(cases, children, strict=True):
            yield _cell("GemLite", case, ours("int4", *_linear(case)), *child.result())
    yield from selected


def _linear(case: tuple[int, int, torch.dtype, str]) -> tuple[Shape, torch.dtype, str]:
    n, k, dtype, target = case
    return Shape(1, n, k), dtype, target


def _cell(
    rival: str, case: tuple[int, int, torch.dtype, str], mine: Cost, theirs: Cost, shipped: float | None = None
) -> Cell:
    n, k, dtype, target = case
    return Cell(rival, (n, k), target, str(dtype).removeprefix("torch."), mine, theirs, shipped)


def show(results: list[Cell]) -> Table:
    """One row per cell."""
    table = Table(title="Thread instructions per weight and DRAM bytes of one call, M = 1")
    for header in ("rival", "N x K", "GPU", "dtype", "theirs", "tuned", "ours", "ratio", "bytes", ""):
        table.add_column(header, justify="left" if header in ("rival", "GPU", "dtype") else "right")
    for cell in results:
        table.add_row(
            cell.rival,
            "{} x {}".format(*cell.shape),
            cell.target,
            cell.dtype,
            f"{cell.theirs.instructions:.2f}",
            "-" if cell.tuned is None else f"{cell.tuned:.2f}",
            f"{cell.ours.instructions:.2f}",
            f"{cell.ours.instructions / cell.theirs.instructions:.2f}",
            f"{cell.ours.bytes / cell.theirs.bytes:.4f}",
            "" if cell.won else "LOST",
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemlite", type=Path, default=ROOT / "build" / "rivals", help="where GemLite was installed")
    parser.add_argument("--json", type=Path, help="also write the cells as JSON")
    options = parser.parse_args()
    results = list(cells(options.gemlite))
    Console(width=120).print(show(results))
    if options.json:
        options.json.write_text(json.dumps([{**asdict(cell), "won": cell.won} for cell in results], indent=2) + "\n")
    return 0 if all(cell.won for cell in results) else 1


if __name__ == "__main__":
    sys.exit(main())
