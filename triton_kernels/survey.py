"""What the kernels cost on linears of well-known models: bytes, machine code and modelled time, without a GPU.

Bytes come from each kernel's formula. The formula is checked by metering: the interpreter runs the same kernel at the
same M, K and dtype on a weight of NARROW outputs, counts the distinct 32-byte sectors it touches, and the formula has
to give exactly that number. Machine code is compiled for the GPU, with the launch that the operator would make for the
true shape. Times are modelled by `cost.py`, from a cold cache.

An input-selected linear is modelled with each token using half of the inputs, independently: M tokens together read the
share `1 - 0.5 ** M` of the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from . import cost, registry
from .launch import Kernel, Launch, Shape

TOKENS = (1, 2, 4, 8)
NARROW = 64
SELECTED = {"input_select": 0.5, "input_select_int4": 0.5}


class Model(NamedTuple):
    """Sizes that give a decoder's linears: `keys` are the outputs of k and v."""

    name: str
    hidden: int
    keys: int
    feed_forward: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """`(N, K)` of the linears of one block."""
        hidden, keys, wide = self.hidden, self.keys, self.feed_forward
        return {
            **{"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)},
            **{"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)},
        }


MODELS = (
    Model("Llama-3.2-1B", 2048, 512, 8192),
    Model("Llama-3.1-8B", 4096, 1024, 14336),
    Model("Llama-3.1-70B", 8192, 1024, 28672),
)


class Row(BaseModel):
    """One operator on one linear of one model, for `m` tokens.

    `shape` is `[N, K]`. `bytes`: DRAM bytes of a cold launch; `metered`: the interpreter counted what the formula says.
    `instr_per_weight`: thread instructions of the whole program per kept weight. `dense_us`: an ideal kernel that only
    streams the dense 16-bit weight, x and y. `int4_us`: this project's dense int4. All times are modelled.
    """

    op: str
    kernels: list[str]
    model: str
    linear: str
    shape: tuple[int, int]
    m: int
    gpu: str
    dtype: str
    bytes: int
    bytes_over_minimum: float
    metered: bool
    spills: int
    registers: int
    warps_per_sm: int
    bytes_in_flight: int
    instr_per_weight: float
    modelled_us: float
    bound: str
    dense_us: float
    int4_us: float | None


class Survey(BaseModel):
    """All rows for one GPU. `times` says where times come from: a model, perhaps calibrated on a device."""

    gpu: str
    times: str
    rows: list[Row]


@dataclasses.dataclass(frozen=True)
class Facts:
    """One operator on one linear, by all its launches together.

    `kernels` by name. `bytes`: DRAM bytes of a cold launch; `minimum_bytes`: with the weights as they lie in the file.
    `metered`: the interpreter counted what the formulas say. `registers`: the most; `spills`: the sum. `warps_per_sm`,
    `bytes_in_flight` (per multiprocessor) and `bound` are those of the longest launch. `microseconds`: modelled.
    """

    kernels: tuple[str, ...]
    bytes: int
    minimum_bytes: int
    metered: bool
    registers: int
    spills: int
    warps_per_sm: int
    bytes_in_flight: int
    instructions_per_weight: float
    microseconds: float
    bound: str


class Case(NamedTuple):
    """One operator on one linear; `gpu` by name, `dtype` by torch's name."""

    op: str
    shape: Shape
    gpu: str
    dtype: str


def read_share(op: str, m: int) -> float:
    """The share of an operator's weights that `m` tokens together read."""
    return 1 - (1 - SELECTED[op]) ** m if op in SELECTED else 1.0


def survey(models: Iterable[Model], ops: Iterable[str], gpu: cost.GPU, dtype: str, cache: Path | None) -> Survey:
    """Every operator on every linear of `models` for TOKENS tokens. `dtype` by torch's name; `cache`: see `facts`."""
    linears = [(model.name, name, *size) for model in models for name, size in model.linears().items()]
    wanted = [(op, *linear, m) for op in ops for linear in linears for m in TOKENS]
    rivals = ("int4",) if "int4" in registry.OPS else ()
    sizes = {(n, k, m): Shape(m, n, k) for _, _, _, n, k, m in wanted}
    cases = [Case(op, shape, gpu.name, dtype) for op in (*ops, *rivals) for shape in sizes.values()]
    known = dict(facts(dict.fromkeys(cases), gpu, cache))
    rows = []
    for op, model, linear, n, k, m in wanted:
        found, int4 = (
            known[Case(op, Shape(m, n, k), gpu.name, dtype)],
            known.get(Case("int4", Shape(m, n, k), gpu.name, dtype)),
        )
        rows.append(
            Row(
                op=op,
                kernels=list(found.kernels),
                model=model,
                linear=linear,
                shape=(n, k),
                m=m,
                gpu=gpu.name,
                dtype=dtype,
                bytes=found.bytes,
                bytes_over_minimum=found.bytes / found.minimum_bytes,
                metered=found.metered,
                spills=found.spills,
                registers=found.registers,
                warps_per_sm=found.warps_per_sm,
                bytes_in_flight=found.bytes_in_flight,
                instr_per_weight=found.instructions_per_weight,
                modelled_us=found.microseconds,
                bound=found.bound,
                dense_us=cost.stream_microseconds(gpu, 2 * (n * k + m * (n + k))),
                int4_us=int4.microseconds if int4 else None,
            )
        )
    return Survey(gpu=gpu.title, times=gpu.source, rows=rows)


def facts(cases: Iterable[Case], gpu: cost.GPU, cache: Path | None, workers: int = 0) -> Iterator[tuple[Case, Facts]]:
    """The facts about every case, in order, computed by `workers` processes (default: one per core, at most eight).

    `cache`: a folder that keeps facts between calls.
    """
    todo = list(cases)
    known = {case: stored for case in todo if (stored := _load(cache, case, gpu)) is not None}
    missing = [case for case in todo if case not in known]
    if len(missing) <= 2:
        yield from _merged(todo, known, (facts_of(case, gpu) for case in missing), cache, gpu)
        return
    workers = workers or min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from _merged(todo, known, pool.map(facts_of, missing, [gpu] * len(missing)), cache, gpu)


def facts_of(case: Case, gpu: cost.GPU) -> Facts:
    """Compile, meter and model one case."""
    from . import aot

    dtype = getattr(torch, case.dtype)
    share = read_share(case.op, case.shape.m)
    launches, names, total, least, instructions = [], [], 0.0, 0.0, 0.0
    metered = True
    weights = 0
    for kernel, launch in registry.steps(case.op, case.shape, dtype, gpu.target):
        binary = aot.compile_launch(kernel.jit(), launch, gpu.target)
        weight_bytes = kernel.weight_bytes(case.shape, dtype)
        if kernel.weights(case.shape):
            unread = (1 - share) * weight_bytes
            size, minimum = (formula(case.shape, dtype) - unread for formula in (kernel.bytes, kernel.minimum_bytes))
            excess = reread_per_program(kernel, case.shape, dtype, gpu.target)
            metered &= excess is not None
        else:  # such as the sum of partial results: reads and writes each of its tensors once
            size = minimum = argument_bytes(launch)
            excess = 0.0
        l2_bytes = size + (excess or 0.0) * launch.programs
        prediction = cost.predict(binary, launch, gpu, round(size), round(l2_bytes), weight_bytes)
        launches.append((prediction, binary))
        names.append(kernel.name)
        total, least = total + size, least + minimum
        threads = launch.programs * launch.num_warps * 32
        instructions += binary.sass.instructions_per_thread(weight_bytes / threads) * threads
        weights = max(weights, kernel.weights(case.shape))
    longest = max((prediction for prediction, _ in launches), key=lambda prediction: prediction.microseconds)
    return Facts(
        kernels=tuple(names),
        bytes=round(total),
        minimum_bytes=round(least),
        metered=metered,
        registers=max(binary.registers for _, binary in launches),
        spills=sum(binary.spills for _, binary in launches),
        warps_per_sm=longest.warps_per_sm,
        bytes_in_flight=longest.bytes_in_flight,
        instructions_per_weight=instructions / weights,
        microseconds=sum(prediction.microseconds for prediction, _ in launches),
        bound=longest.bound,
    )


def argument_bytes(launch: Launch) -> int:
    """Bytes of the launch's distinct tensors."""
    tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def reread_per_program(kernel: Kernel, shape: Shape, dtype: torch.dtype, target: str) -> float | None:
    """Bytes that a program asks of the L2 cache although another program has asked for them, on a narrow weight.

    None when the kernel's byte formula is not confirmed: it has no `sample`, or metering counts another number.
    """
    from .simulate.meter import meter

    if kernel.sample is None:
        return None
    narrow = Shape(shape.m, min(NARROW, shape.n), shape.k)
    launch = kernel.sample(narrow, dtype, target)
    counted = meter(kernel.jit(), launch)
    if counted.dram_bytes != kernel.bytes(narrow, dtype):
        return None
    return (counted.l2_bytes - counted.dram_bytes) / launch.programs


def _merged(
    todo: list[Case], known: dict[Case, Facts], computed: Iterable[Facts], cache: Path | None, gpu: cost.GPU
) -> Iterator[tuple[Case, Facts]]:
    fresh = iter(computed)
    for case in todo:
        if case not in known:
            known[case] = next(fresh)
            _store(cache, case, gpu, known[case])
        yield case, known[case]


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the cache: small JSON files, named by a hash of everything that decides their content ---


def _file(cache: Path, case: Case, gpu: cost.GPU) -> Path:
    import triton

    here = Path(__file__).parent
    digest = hashlib.sha256(repr((case, gpu, triton.__version__, torch.__version__)).encode())
    for source in sorted(here.rglob("*.py")):  # operators share kernels
        if source.parent != here / "cpu":
            digest.update(source.read_bytes())
    return cache / f"{digest.hexdigest()[:32]}.json"


def _load(cache: Path | None, case: Case, gpu: cost.GPU) -> Facts | None:
    if cache is None:
        return None
    try:
        data: dict[str, Any] = json.loads(_file(cache, case, gpu).read_text(encoding="utf-8"))
        return Facts(**{**data, "kernels": tuple(data["kernels"])})
    except (OSError, ValueError, TypeError, KeyError):  # absent, or damaged: compute it again
        return None


def _store(cache: Path | None, case: Case, gpu: cost.GPU, facts: Facts) -> None:
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    target = _file(cache, case, gpu)
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(facts)), encoding="utf-8")
    partial.replace(target)
