"""The first thing to run on a machine with a GPU: are the kernels right there, and how fast are they really?

    python scripts/gpu_suite.py --out results/gpu            # correctness, calibration, measurements
    python scripts/gpu_suite.py --dry-run                    # list what would run; needs no GPU

1. Correctness: every kernel, inline assembly included, runs on the device on random inputs and is held against the
   interpreter's result on the same inputs (which the tests hold against fp64 references). bf16 `tl.dot` is wrong in
   Triton's interpreter, so kernels that use it are checked in fp16 only.
2. Calibration of the cost model: streaming bandwidth, the cost of a launch inside a CUDA graph, the latency of
   dependent loads. Written to `calibration.json`, which `halfweight kernels --calibration` takes.
3. Measurements: every operator on the linears of a Llama, M = 1, 2, 4, 8, against torch's bf16 matmul and torch's int4
   (`_weight_int4pack_mm`). Each launch reads another copy of its weight, more copies than fit into the L2 cache;
   launches run in a CUDA graph; reported are the median over replays, and the 10th and 90th percentile.

It was written without a GPU: what needs none is tested, the rest has not run yet.

Writes `results.json` and `results.md`. NVIDIA only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfweight.triton_kernels import cost, registry, survey
from halfweight.triton_kernels.launch import Kernel, Launch, Shape

CHECKED = ((64, 512), (200, 1544))  # (N, K): whole tiles, and ragged
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1e-2}
CACHES = 4  # copies of a weight hold this many times the L2 cache
REPLAYS, WARMUP = 30, 5
STREAM_BYTES, CHASE_STEPS, LAUNCHES = 2**30, 4096, 400
LOADED = 1.5  # assumed: latency under load over idle latency
console = Console()


# --- plain functions ---


@dataclass(frozen=True)
class Timing:
    """Microseconds: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One implementation on one linear; `gigabytes_per_second` of its own bytes."""

    name: str
    shape: tuple[int, int]
    m: int
    dtype: str
    timing: Timing
    bytes: int
    modelled_us: float | None = None

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.timing.median / 1e3


@dataclass(frozen=True)
class Check:
    """One kernel against the interpreter: relative RMS error of everything it wrote, or why it did not run."""

    kernel: str
    shape: tuple[int, int, int]
    dtype: str
    error: float | None
    passed: bool
    note: str = ""


def summary(samples: Sequence[float]) -> Timing:
    """Median and spread; one sample is its own spread. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), tenths[0], tenths[-1])


def copies_needed(weight_bytes: int, l2_bytes: int, memory: int) -> int:
    """How many copies of a weight to rotate through so that none is still in the L2 cache, within half of `memory`."""
    wanted = max(2, -(-CACHES * l2_bytes // max(1, weight_bytes)) + 1)
    return max(1, min(wanted, memory // 2 // max(1, weight_bytes)))


def checks(ops: Iterable[str], target: str) -> list[tuple[Kernel, Shape, torch.dtype]]:
    """Every kernel that can be sampled and runs on `target`, at the ends of its M and at 1 and 8, in both dtypes."""
    found = []
    for kernel in (kernel for op in ops for kernel in registry.kernels(op)):
        if kernel.sample is None or target not in kernel.targets:
            continue
        least, most = kernel.m_range
        for m in sorted({least, min(most, 64), *(m for m in (1, 8) if least <= m <= most)}):
            found += [(kernel, Shape(m, n, k), dtype) for n, k in CHECKED for dtype in TOLERANCE]
    return found


def linears(model: str) -> list[tuple[int, int]]:
    """The distinct `(N, K)` of a model of the survey. Raises ValueError for an unknown one."""
    for known in survey.MODELS:
        if known.name.lower().endswith(f"-{model.lower()}"):
            return list(dict.fromkeys(known.linears().values()))
    raise ValueError(f"unknown model {model}; choose from 1B, 8B, 70B")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS error; positions where both are NaN agree."""
    got, want = got.double(), want.double()
    same = got.isnan() & want.isnan()
    difference = (got - want).masked_fill(same, 0)
    return float(difference.norm() / want.masked_fill(same, 0).norm().clamp_min(1e-30))


def calibration(gpu: str, bandwidth: float, overhead: float, latency: float) -> dict[str, Any]:
    """What `cost.calibrated` reads."""
    return {"gpu": gpu, "bandwidth": bandwidth, "overhead": overhead, "latency": latency}


def markdown(title: str, checked: Sequence[Check], numbers: dict[str, Any], measured: Sequence[Measured]) -> str:
    """The report."""
    failed = [check for check in checked if not check.passed]
    lines = [f"# {title}", "", f"{len(checked) - len(failed)} of {len(checked)} kernel checks passed.", ""]
    lines += [f"- FAILED {c.kernel} {c.shape} {c.dtype}: {c.note or f'relative error {c.error:.1e}'}" for c in failed]
    lines += ["", "Calibration: " + ", ".join(f"{key} {value}" for key, value in numbers.items()), ""]
    lines += ["| N x K | M | dtype | what | us (10 % - 90 %) | GB/s | over torch bf16 | modelled us |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    dense = {(row.shape, row.m): row.timing.median for row in measured if row.name == "torch bf16"}
    for row in measured:
        base, time = dense.get((row.shape, row.m)), row.timing
        faster = "-" if base is None else f"{base / time.median:.2f}x"
        modelled = "-" if row.modelled_us is None else f"{row.modelled_us:.1f}"
        lines.append(
            f"| {row.shape[0]} x {row.shape[1]} | {row.m} | {row.dtype} | {row.name} "
            f"| {time.median:.1f} ({time.low:.1f} - {time.high:.1f}) | {row.gigabytes_per_second:.0f} "
            f"| {faster} | {modelled} |"
        )
    return "\n".join(lines) + "\n"


# --- on the device ---


def on_device(launch: Launch) -> Launch:
    """The same launch with its tensors on the GPU; tensors that share storage share it there too."""
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in moved:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            moved[storage.data_ptr()] = whole.cuda()
        there = torch.empty(0, dtype=tensor.dtype, device="cuda")
        return there.set_(
            moved[storage.data_ptr()].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    arguments = {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    return dataclasses.replace(launch, arguments=arguments)


def check(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: str) -> Check:
    """Run on the device and in the interpreter, and compare every tensor that either changed."""
    from halfweight.triton_kernels import aot
    from halfweight.triton_kernels.simulate.interpreter import interpret

    name = str(dtype).removeprefix("torch.")
    assert kernel.sample is not None
    launch = kernel.sample(shape, dtype, target)
    if dtype == torch.bfloat16 and "tt.dot" in aot.compile_launch(kernel.jit(), launch, target).ttgir:
        return Check(kernel.name, tuple(shape), name, None, True, "tl.dot: checked in fp16")
    device = on_device(launch)
    try:
        kernel.run(device)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return Check(kernel.name, tuple(shape), name, None, False, str(error).splitlines()[0])
    before = {key: value.clone() for key, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    interpret(kernel.jit(), launch)
    worst = 0.0
    for key, old in before.items():
        want, got = launch.arguments[key], device.arguments[key].cpu()
        if not (torch.equal(want, old) and torch.equal(got, old)) and want.is_floating_point():
            worst = max(worst, relative_error(got, want))
        elif not want.is_floating_point() and not torch.equal(got, want):
            worst = float("inf")
    return Check(kernel.name, tuple(shape), name, worst, worst <= TOLERANCE[dtype])


def replay(launches: Sequence[Callable[[], object]]) -> Timing:
    """Microseconds per launch of a CUDA graph that holds all `launches` in order."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for run in launches:
                run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in launches:
            run()
    samples = []
    for index in range(WARMUP + REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if index >= WARMUP:
            samples.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return summary(samples)


def calibrate(gpu: str) -> dict[str, Any]:
    """Measure what the cost model assumes."""
    import gpu_kernels

    source = torch.ones(STREAM_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy = replay([lambda: target.copy_(source)])
    read = replay([lambda: torch.sum(source)])
    bandwidth = max(2 * STREAM_BYTES / copy.median, STREAM_BYTES / read.median) * 1e6
    out = torch.zeros(1, dtype=torch.int64, device="cuda")
    overhead = replay([lambda: gpu_kernels.nothing[(1,)](out, num_warps=1)] * LAUNCHES).median * 1e-6
    stride = 2**21 // 8 + 2**5  # another page every time, longer than any cache
    size = STREAM_BYTES // 8
    ring = (torch.arange(size, device="cuda") + stride) % size
    chase = replay([lambda: gpu_kernels.chase[(1,)](ring, out, CHASE_STEPS, num_warps=1)])
    latency = LOADED * chase.median * 1e-6 / CHASE_STEPS
    return calibration(gpu, bandwidth, overhead, latency)


def measure_operator(op: str, shape: Shape, dtype: torch.dtype, gpu: cost.GPU) -> Measured:
    """All launches of one operator, rotating through copies of their tensors."""
    steps = registry.steps(op, shape, dtype, gpu.target)
    launches, total = [], 0
    for kernel, _ in steps:
        assert kernel.sample is not None
        launches.append((kernel, on_device(kernel.sample(shape, dtype, gpu.target))))
        total += survey.argument_bytes(launches[-1][1])
    properties = torch.cuda.get_device_properties(0)
    copies = copies_needed(total, properties.L2_cache_size, torch.cuda.mem_get_info()[0])
    rotation = [(kernel, cloned(launch)) for _ in range(copies) for kernel, launch in launches]
    timing = replay([lambda kernel=kernel, launch=launch: kernel.run(launch) for kernel, launch in rotation])
    per_call = Timing(*(len(steps) * value for value in dataclasses.astuple(timing)))
    facts = survey.facts_of(survey.Case(op, shape, gpu.name, str(dtype).removeprefix("torch.")), gpu)
    size = sum(kernel.bytes(shape, dtype) for kernel, _ in steps)
    name = str(dtype).removeprefix("torch.")
    return Measured(op, (shape.n, shape.k), shape.m, name, per_call, size, facts.microseconds)


def cloned(launch: Launch) -> Launch:
    """The launch with copies of its tensors."""
    arguments = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    return dataclasses.replace(launch, arguments=arguments)


def measure_torch(shape: Shape) -> list[Measured]:
    """torch's bf16 matmul and torch's int4 (groups of 128)."""
    m, n, k = shape
    l2, free = torch.cuda.get_device_properties(0).L2_cache_size, torch.cuda.mem_get_info()[0]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    size = 2 * (n * k + m * (n + k))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_needed(size, l2, free))]
    timing = replay([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])
    rows = [Measured("torch bf16", (n, k), m, "bfloat16", timing, size)]
    del weights
    size = n * k // 2 + n * k // 128 * 4 + 2 * m * (n + k)
    packed = torch._convert_weight_to_int4pack(
        torch.randint(256, (n, k // 2), device="cuda", dtype=torch.uint8), 8 if k % 128 == 0 else 2
    )
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    copies = [(packed.clone(), scales.clone()) for _ in range(copies_needed(size, l2, torch.cuda.mem_get_info()[0]))]
    timing = replay([lambda w=w, s=s: torch._weight_int4pack_mm(x, w, 128, s) for w, s in copies])
    return [*rows, Measured("torch int4", (n, k), m, "bfloat16", timing, size)]


# --- the command ---


def dry_run(ops: Sequence[str], model: str, target: str) -> None:
    """Print what would run."""
    planned = checks(ops, target)
    console.print(f"correctness: {len(planned)} runs of {len({kernel.name for kernel, _, _ in planned})} kernels")
    for name in dict.fromkeys(kernel.name for kernel, _, _ in planned):
        tokens = sorted({shape.m for kernel, shape, _ in planned if kernel.name == name})
        console.print(f"  {name}: M = {', '.join(map(str, tokens))}")
    console.print("calibration: streaming bandwidth, launch overhead, latency of dependent loads")
    console.print(f"measurements: {', '.join(ops)}, torch bf16, torch int4")
    for n, k in linears(model):
        console.print(f"  {n} x {k}: M = {', '.join(map(str, survey.TOKENS))}")


def nearest(name: str, target: str) -> cost.GPU:
    """The GPU of the cost model that a device is, or else the first of its compute capability, or the H100."""
    known = list(cost.GPUS.values())
    by_name = [gpu for gpu in known if gpu.name in name.lower()]
    return next(iter(by_name or [gpu for gpu in known if gpu.target == target] or known[-1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for results")
    parser.add_argument("--op", action="append", choices=registry.OPS, help="only this operator; may be repeated")
    parser.add_argument("--model", default="8B", help="linears of which Llama: 1B, 8B (default) or 70B")
    parser.add_argument("--target", default="sm_90", help="with --dry-run: plan for this GPU")
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    options = parser.parse_args(arguments)
    ops = options.op or list(registry.OPS)
    try:
        shapes = linears(options.model)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        dry_run(ops, options.model, options.target)
        return 0
    if not torch.cuda.is_available() or torch.version.hip is not None:
        console.print("no NVIDIA GPU here; --dry-run lists what would run on one", style="bold red")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    model_gpu = nearest(name, target)
    checked = []
    for case in checks(ops, target):
        checked.append(check(*case, target))
        state = "ok" if checked[-1].passed else "[bold red]FAILED[/]"
        console.print(f"{state} {checked[-1].kernel} {checked[-1].shape} {checked[-1].dtype} {checked[-1].note}")
    numbers = calibrate(model_gpu.name)
    file = options.out / "calibration.json"
    file.write_text(json.dumps(numbers, indent=2) + "\n")
    gpu = dataclasses.replace(cost.calibrated(model_gpu, file), target=target)
    broken = {c.kernel.partition(".")[0] for c in checked if not c.passed}
    measured: list[Measured] = []
    for n, k in shapes:
        for m in survey.TOKENS:
            measured += measure_torch(Shape(m, n, k))
            measured += [measure_operator(op, Shape(m, n, k), torch.bfloat16, gpu) for op in ops if op not in broken]
            console.print(f"measured {n} x {k}, M = {m}")
    rows = [{**asdict(row), "gigabytes_per_second": row.gigabytes_per_second} for row in measured]
    result = {"gpu": name, "target": target, "checks": [asdict(c) for c in checked], "calibration": numbers}
    (options.out / "results.json").write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")
    (options.out / "results.md").write_text(markdown(f"Kernels on {name}", checked, numbers, measured))
    console.print(f"wrote {options.out}/results.md")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
