"""Model how long a launch takes on a GPU that is not here, from its bytes, its machine code and its occupancy.

    time = launch overhead + tail * max(dram, l2, issue, latency)

- dram: bytes of a cold launch over the bandwidth that streaming reaches;
- l2: bytes that all programs together ask of the L2 cache over its bandwidth;
- issue: instructions over the four schedulers of every multiprocessor, or the busiest pipe among 32-bit integers,
  conversions and tensor cores;
- latency: Little's law; bytes in flight are resident warps times what the machine code lets one warp have outstanding;
- tail: half of the last wave's idle share, since blocks do not finish in step.

This ranks configurations and names what limits them. It says nothing that was measured: results are "modelled" until
`calibrated` puts in numbers from the device (`scripts/gpu_suite.py` writes them).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aot import Binary
    from .launch import Launch

_REGISTERS = 65536  # per multiprocessor, all targets here
_SCHEDULERS = 4
_SCHEDULER_USE = 0.85  # assumed: the share of issue slots that dependent instructions leave usable
_RESERVED_SHARED = 1024  # bytes per block that the driver keeps, since compute capability 8.0
_CONVERSIONS_PER_CLOCK = 16  # assumed
_INTEGER_OPCODES = ("LOP3", "SHF", "IADD", "VIADD", "ISETP", "LEA", "PRMT", "SEL", "IMNMX", "VIMNMX")
_CONVERSION_OPCODES = ("I2F", "F2I", "F2F", "MUFU")
_TENSOR_OPCODES = ("HMMA",)
_TENSOR_FMAS = 16 * 8 * 16  # of one m16n8k16, and of one sparse m16n8k32


@dataclass(frozen=True)
class GPU:
    """A GPU as the model sees it.

    Published by NVIDIA: `multiprocessors`, `clock` (boost, Hz), `bandwidth` (peak, bytes/s), `warps`, `blocks` and
    `shared` bytes per multiprocessor, `tensor_fmas` (16-bit products with fp32 sums, per clock and multiprocessor) and
    `integer_lanes`. Assumed, to be calibrated: `efficiency` (share of the peak bandwidth that streaming reaches),
    `l2_bandwidth`, `latency` (seconds, loaded DRAM: about 1.5 times the idle latencies that microbenchmarks report) and
    `overhead` (seconds per launch inside a CUDA graph, ramp-up included).
    """

    name: str
    title: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    warps: int
    blocks: int
    shared: int
    tensor_fmas: int
    l2_bandwidth: float
    latency: float
    integer_lanes: int = 64
    efficiency: float = 0.92
    overhead: float = 2.5e-6
    source: str = "modelled"


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU(
            *("a100", "A100 SXM 80 GB", "sm_80", 108, 1.41e9, 2.039e12, 64, 32, 164 << 10, 1024),
            l2_bandwidth=4.5e12,
            latency=500e-9,
        ),
        GPU(
            *("4090", "GeForce RTX 4090", "sm_89", 128, 2.52e9, 1.008e12, 48, 24, 100 << 10, 512),
            l2_bandwidth=4.5e12,
            latency=330e-9,
        ),
        GPU(
            *("h100", "H100 SXM", "sm_90", 132, 1.83e9, 3.35e12, 64, 32, 228 << 10, 2048),
            l2_bandwidth=6.0e12,
            latency=450e-9,
        ),
    )
}


@dataclass(frozen=True)
class Prediction:
    """`microseconds` of one launch; `bound` is the largest of `parts` (microseconds of dram, l2, issue and latency).

    `warps_per_sm`: resident warps at full occupancy. `bytes_in_flight`: per multiprocessor, with this launch's warps.
    """

    microseconds: float
    bound: str
    parts: dict[str, float]
    warps_per_sm: int
    bytes_in_flight: int
    tail: float


def blocks_per_multiprocessor(gpu: GPU, registers: int, shared: int, num_warps: int) -> int:
    """Blocks of `num_warps` warps that fit on one multiprocessor; `registers` per thread, `shared` bytes per block."""
    # Each of the four schedulers has a quarter of the registers, handed out in units of 256 per warp.
    per_warp = max(1, math.ceil(registers / 8)) * 8 * 32
    warps = _REGISTERS // _SCHEDULERS // per_warp * _SCHEDULERS
    by_shared = gpu.shared // (shared + _RESERVED_SHARED)
    return min(min(warps, gpu.warps) // num_warps, by_shared, gpu.blocks)


def predict(binary: Binary, launch: Launch, gpu: GPU, dram_bytes: int, l2_bytes: int, weight_bytes: int) -> Prediction:
    """Model `launch` of `binary`, which must be compiled for `gpu.target`.

    `weight_bytes`: what the launch loads with `evict_first`; it decides how often the main loop runs. Raises ValueError
    for another target, and when a block does not fit on the GPU.
    """
    if binary.target != gpu.target:
        raise ValueError(f"compiled for {binary.target}, but {gpu.title} is {gpu.target}")
    fitting = blocks_per_multiprocessor(gpu, binary.registers, binary.shared, launch.num_warps)
    if not fitting:
        raise ValueError(f"a block of {binary.registers} registers x {launch.num_warps} warps does not fit {gpu.title}")
    programs, busy = launch.programs, min(gpu.multiprocessors, launch.programs)
    resident = min(fitting, math.ceil(programs / gpu.multiprocessors)) * launch.num_warps
    in_flight = resident * max(binary.sass.bytes_in_flight, 64)
    parts = {
        "dram": dram_bytes / (gpu.bandwidth * gpu.efficiency),
        "l2": l2_bytes / gpu.l2_bandwidth,
        "issue": _issue_seconds(binary, launch, gpu, weight_bytes),
        "latency": dram_bytes * gpu.latency / (busy * in_flight),
    }
    bound = max(parts, key=lambda name: parts[name])
    waves = programs / (gpu.multiprocessors * fitting)
    tail = 1 + (math.ceil(waves) / waves - 1) / 2 if waves > 1 else 1.0
    return Prediction(
        microseconds=1e6 * (gpu.overhead + tail * parts[bound]),
        bound=bound,
        parts={name: 1e6 * seconds for name, seconds in parts.items()},
        warps_per_sm=fitting * launch.num_warps,
        bytes_in_flight=in_flight,
        tail=tail,
    )


def stream_microseconds(gpu: GPU, dram_bytes: int) -> float:
    """Modelled time of an ideal kernel that does nothing but stream `dram_bytes`."""
    return 1e6 * (gpu.overhead + dram_bytes / (gpu.bandwidth * gpu.efficiency))


def _issue_seconds(binary: Binary, launch: Launch, gpu: GPU, weight_bytes: int) -> float:
    """Seconds that the busiest of schedulers, integer pipe, conversion pipe and tensor cores needs."""
    warps = launch.programs * launch.num_warps
    per_thread = weight_bytes / (warps * 32)

    def executed(*opcodes: str) -> float:
        return binary.sass.instructions_per_thread(per_thread, *opcodes)

    clocks = max(
        executed() / (_SCHEDULERS * _SCHEDULER_USE),
        executed(*_INTEGER_OPCODES) * 32 / gpu.integer_lanes,
        executed(*_CONVERSION_OPCODES) * 32 / _CONVERSIONS_PER_CLOCK,
        executed(*_TENSOR_OPCODES) * _TENSOR_FMAS / gpu.tensor_fmas,
    )
    return clocks * warps / (min(gpu.multiprocessors, launch.programs) * gpu.clock)


def calibrated(gpu: GPU, file: Path) -> GPU:
    """`gpu` with the numbers measured on one, from `file`: JSON of `{"gpu": name, "bandwidth": bytes/s, ...}`.

    Optional besides `bandwidth`: `overhead`, `latency` (seconds) and `l2_bandwidth` (bytes/s). Raises ValueError in one
    line on anything else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no calibration: {error}") from None
    known = {"bandwidth", "overhead", "latency", "l2_bandwidth"}
    if not isinstance(data, dict) or data.get("gpu") != gpu.name:
        raise ValueError(f"{file}: no calibration of {gpu.name}")
    measured = {key: value for key, value in data.items() if key in known}
    positive = (isinstance(value, int | float) and 0 < value < math.inf for value in measured.values())
    if "bandwidth" not in measured or not all(positive):
        raise ValueError(f"{file}: needs a positive bandwidth, and positive numbers throughout")
    return dataclasses.replace(gpu, **measured, efficiency=1.0, source=f"modelled, calibrated by {file.name}")
