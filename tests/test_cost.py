"""The cost model: occupancy against published limits, each bound, calibration; and the reading of machine code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import small_kernels
from halfweight.triton_kernels import aot, cost, sass
from halfweight.triton_kernels.launch import Launch

A100, RTX4090, H100 = (cost.GPUS[name] for name in ("a100", "4090", "h100"))
N, K = 4096, 4096


def row_dot(target: str, n: int = N, k: int = K, num_warps: int = 1) -> tuple[Launch, aot.Binary]:
    tensors = [torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((n, k), (k,), (n,))]
    launch = dataclasses.replace(small_kernels.row_dot_launch(*tensors), num_warps=num_warps)
    return launch, aot.compile_launch(small_kernels.row_dot, launch, target)


# --- machine code ---


def test_weight_loads_are_recognised() -> None:
    _, binary = row_dot("sm_90")
    loads = [instruction for instruction in binary.sass.instructions if instruction.is_weight_load]
    assert loads and all(load.opcode == "LDG.E.EF.128" for load in loads)
    assert sass.weight_bytes(binary.sass.main_loop) == 4 * 256 * 2 // 32  # bytes per thread of one 4 x 256 tile
    assert binary.spills == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_weight_loads_are_marked_on_every_target(target: str) -> None:
    _, binary = row_dot(target)
    assert binary.sass.count("LDG.E.EF.128") > 0
    assert len(binary.sass.main_loop) < len(binary.sass.instructions)


def test_instructions_per_weight_counts_the_whole_program() -> None:
    launch, binary = row_dot("sm_90")
    measured = aot.instructions_per_weight(launch, binary, N * K, 2 * N * K)
    loop, whole = len(binary.sass.main_loop), len(binary.sass.instructions)
    threads = launch.programs * 32
    assert measured == pytest.approx((whole - loop + loop * K / 256) * threads / (N * K))
    adds = binary.sass.instructions_per_thread(2 * N * K / threads, "FFMA", "FADD", "FMUL", "HFMA2")
    assert adds * threads / (N * K) >= 1  # at least one multiplication per weight


def test_bytes_in_flight() -> None:
    def code(*rows: tuple[str, int | None, int]) -> sass.Sass:
        instructions = tuple(sass.Instruction(text, text.split()[0], signals, waits) for text, signals, waits in rows)
        return sass.Sass(instructions, ((0, len(rows) - 1),))

    load, use = "LDG.E.EF.128 R4, [R2]", "FFMA R0, R4, R5, R0"
    assert code((load, 0, 0), (use, None, 1), ("BRA .L_x_0", None, 0)).bytes_in_flight == 512
    assert code((load, 0, 0), (load, 1, 0), (use, None, 1), (use, None, 2)).bytes_in_flight == 1024
    assert code((load, 0, 0), (use, None, 1), (load, 0, 0), (use, None, 1)).bytes_in_flight == 512
    # A load that is awaited in the next trip overlaps with its successor.
    assert code((load, 0, 2), (load, 1, 1), (use, None, 0)).bytes_in_flight == 512
    assert code((load, 0, 0), (use, None, 2), (load, 1, 1)).bytes_in_flight == 1024
    # Loads of activations count only where there are no others.
    other = "LDG.E.EL.128 R4, [R2]"
    assert code((other, 0, 0), (load, 1, 0), (use, None, 1), (use, None, 2)).bytes_in_flight == 512
    assert code((other, 0, 0), (use, None, 1)).bytes_in_flight == 512


def test_amd_has_no_sass() -> None:
    launch, binary = row_dot("gfx942")
    assert binary.registers > 0 and binary.spills == 0 and binary.num_warps == launch.num_warps
    with pytest.raises(ValueError, match="no SASS"):
        _ = binary.sass


def test_specialisation_follows_the_just_in_time_compiler() -> None:
    launch = small_kernels.row_dot_launch(*(torch.empty(s, device="meta") for s in ((64, 500), (500,), (64,))))
    signature, constants, divisible = aot.specialise(small_kernels.row_dot, launch)
    assert signature == {
        **{"w_ptr": "*fp32", "x_ptr": "*fp32", "y_ptr": "*fp32", "rows": "i32", "columns": "i32", "stride": "i32"},
        **{"BLOCK_N": "constexpr", "BLOCK_K": "constexpr"},
    }
    assert constants == {"BLOCK_N": 4, "BLOCK_K": 256}
    assert divisible == [0, 1, 2, 3]  # 64 rows, but 500 columns
    one = dataclasses.replace(launch, arguments={**launch.arguments, "rows": 1, "columns": 2**40, "stride": 0.5})
    signature, constants, divisible = aot.specialise(small_kernels.row_dot, one)
    assert (signature["rows"], constants["rows"]) == ("constexpr", 1)
    assert (signature["columns"], signature["stride"]) == ("i64", "fp32")
    assert divisible == [0, 1, 2, 4]


# --- occupancy ---


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "num_warps", "blocks"),
    [
        (A100, 32, 0, 4, 16),  # 64 warps
        (A100, 32, 0, 1, 32),  # 32 blocks
        (A100, 64, 0, 4, 8),  # registers
        (A100, 255, 0, 1, 8),
        (A100, 72, 0, 8, 3),  # 28 warps of 72 registers
        (A100, 32, 48 << 10, 4, 3),  # 164 KB of shared memory, 1 KB reserved per block
        (RTX4090, 32, 0, 4, 12),  # 48 warps
        (RTX4090, 32, 0, 1, 24),
        (H100, 32, 113 << 10, 4, 2),
        (H100, 255, 0, 16, 0),  # does not fit
    ],
)
def test_occupancy(gpu: cost.GPU, registers: int, shared: int, num_warps: int, blocks: int) -> None:
    assert cost.blocks_per_multiprocessor(gpu, registers, shared, num_warps) == blocks


# --- predictions ---


def test_time_is_overhead_plus_the_largest_part() -> None:
    launch, binary = row_dot("sm_89")
    size = 2 * N * K
    result = cost.predict(binary, launch, RTX4090, size, size, size)
    assert result.bound == "dram"
    streaming = 1e6 * size / (1.008e12 * 0.92)
    assert result.parts["dram"] == pytest.approx(streaming)
    assert result.microseconds == pytest.approx(2.5 + result.tail * streaming)
    assert result.microseconds >= cost.stream_microseconds(RTX4090, size) == pytest.approx(2.5 + streaming)


def test_each_resource_can_be_the_bound() -> None:
    launch, binary = row_dot("sm_90")
    size = 2 * N * K
    gpus = {
        "dram": dataclasses.replace(H100, bandwidth=1e11),
        "l2": dataclasses.replace(H100, l2_bandwidth=1e10),
        "issue": dataclasses.replace(H100, clock=1e7),
        "latency": dataclasses.replace(H100, latency=1e-4),
    }
    for bound, gpu in gpus.items():
        assert cost.predict(binary, launch, gpu, size, size, size).bound == bound
    # Tensor cores and conversions bound nothing that has none of them.
    slow = dataclasses.replace(H100, tensor_fmas=1)
    assert cost.predict(binary, launch, slow, size, size, size) == cost.predict(binary, launch, H100, size, size, size)


def test_more_work_never_takes_less_time() -> None:
    times = []
    for n in (1024, 4096, 16384, 65536):
        launch, binary = row_dot("sm_90", n)
        times.append(cost.predict(binary, launch, H100, 2 * n * K, 2 * n * K, 2 * n * K).microseconds)
    assert times == sorted(times)


def test_a_binary_of_another_gpu_is_refused() -> None:
    launch, binary = row_dot("sm_80")
    with pytest.raises(ValueError, match="compiled for sm_80, but H100 SXM is sm_90"):
        cost.predict(binary, launch, H100, 1, 1, 1)
    huge = dataclasses.replace(binary, registers=255)
    with pytest.raises(ValueError, match="does not fit"):
        cost.predict(huge, dataclasses.replace(launch, num_warps=16), A100, 1, 1, 1)


# --- calibration ---


def test_calibration_replaces_the_assumptions(tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    file.write_text(json.dumps({"gpu": "h100", "bandwidth": 3e12, "overhead": 2e-6, "latency": 6e-7, "date": "?"}))
    gpu = cost.calibrated(H100, file)
    assert (gpu.bandwidth, gpu.efficiency, gpu.overhead, gpu.latency) == (3e12, 1.0, 2e-6, 6e-7)
    assert gpu.l2_bandwidth == H100.l2_bandwidth and gpu.source == "modelled, calibrated by h100.json"
    assert cost.stream_microseconds(gpu, 3_000_000) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"gpu": "a100", "bandwidth": 1}', '{"gpu": "h100"}', '{"gpu": "h100", "bandwidth": -1}',
     '{"gpu": "h100", "bandwidth": 1, "latency": "fast"}', '{"gpu": "h100", "bandwidth": Infinity}'],
)  # fmt: skip
def test_a_bad_calibration_is_one_line(content: str, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json: ") as raised:
        cost.calibrated(H100, file)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no calibration"):
        cost.calibrated(H100, tmp_path / "missing.json")
