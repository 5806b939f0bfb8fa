"""Compile GemLite's int4 GEMV without a GPU, every configuration its autotuner would try, and print what it costs.

    PYTHONPATH=build/rivals python scripts/peers/gemlite_kernels.py sm_90 float16 128 4096 4096

Arguments: target, dtype, group size, N, K. Prints one JSON list: thread instructions per weight, registers and spills
of each configuration. The kernel is taken from the installed package as it is; only its questions about the GPU are
answered here. It has no loop, so its instructions are simply those of its machine code.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from halfweight.triton_kernels import aot
from halfweight.triton_kernels.launch import Launch

PASSES = 2  # tiles of K that one program of the kernel walks
GPU_NAMES = {"sm_80": "a100", "sm_89": "4090", "sm_90": "h100"}


class Driver:
    """What the package asks of Triton's driver when it is imported."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return aot.gpu_target(self.target)

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None


def load(target: str) -> Any:
    """GemLite's kernel (an Autotuner), imported as if on `target`."""
    capability = divmod(int(target.removeprefix("sm_")), 10)
    properties = SimpleNamespace(
        name=GPU_NAMES[target], major=capability[0], minor=capability[1], multi_processor_count=108
    )
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: GPU_NAMES[target]
    triton.runtime.driver.set_active(Driver(target))
    from gemlite.triton_kernels import gemv_revsplitK_kernels

    return gemv_revsplitK_kernels.gemv_INT_revsplitK_kernel


def tuned(target: str, n: int, k: int, group: int) -> list[triton.Config]:
    """The configurations that the package ships for this GPU and shape, measured by its authors."""
    import gemlite

    file = Path(gemlite.__file__).parent / "configs" / f"{GPU_NAMES[target]}.json"
    found = []
    for key, values in json.loads(file.read_text()).get("GEMV_REVSPLITK", {}).items():
        m, *rest = (int(part) for part in key.strip("()").split(","))
        if (m, *rest[:4]) == (1, n, k, group, 8):
            blocks = {name: values[name] for name in ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "A_load_order", "dot_prod_mode")}
            found.append(triton.Config(blocks, num_warps=values["num_warps"], num_stages=values["num_stages"]))
    return found


def launch(config: triton.Config, target: str, dtype: torch.dtype, group: int, n: int, k: int) -> Launch:
    """The package's launch for one token: symmetric int4 with zero point 8, eight codes per int32, `[K/8, N]`."""
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    # bf16 atomics are native from sm_90 on; before, the package adds in fp32 and converts in another launch.
    out = torch.float32 if dtype == torch.bfloat16 and target < "sm_90" else dtype
    tile_n, tile_k = config.kwargs["BLOCK_SIZE_N"], min(config.kwargs["BLOCK_SIZE_K"], group // PASSES)
    tensors = {
        "a_ptr": torch.empty((1, k), dtype=dtype, device="meta"),
        "b_ptr": torch.empty((k // 8, n), dtype=torch.int32, device="meta"),
        "c_ptr": torch.empty((1, n), dtype=out, device="meta"),
        "scales_ptr": torch.empty((k // group, n), dtype=dtype, device="meta"),
        "zeros_ptr": torch.empty(1, dtype=torch.int32, device="meta"),
    }
    strides = {"stride_am": k, "stride_ak": 1, "stride_bk": n, "stride_bn": 1, "stride_cm": n, "stride_cn": 1}
    strides |= {"stride_meta_a_m": 0, "stride_meta_a_g": 0, "stride_meta_g": n, "stride_meta_n": 1}
    constants = {
        **{"scales_a_ptr": None, "N": n, "K": k, "W_nbits": 4, "group_size": group, "unpack_mask": 15},
        **{"elements_per_sample": 8, "type_id": 0, "use_prehook": False, **strides},
        **{"input_dtype": kind, "output_dtype": kind if out == dtype else tl.float32, "acc_dtype": tl.float32},
        **{"meta_dtype": kind, "channel_scale_mode": 0, "W_group_mode": 3, "zero_is_scalar": True},
        **{"BLOCK_SIZE_M": 1, "BLOCK_SIZE_N": tile_n, "BLOCK_SIZE_K": tile_k},
        **{"A_load_order": config.kwargs["A_load_order"], "dot_prod_mode": 0, "data_contiguous": True},
        **{"dump_b_val": 0, "meta_evict_policy": "", "atomic_mode": "relaxed"},
        **{"a_evict": "evict_last", "b_evict": "evict_first"},
        **{"EVEN_K": k % (PASSES * tile_k) == 0, "EVEN_N": n % tile_n == 0, "block_quant_size": 128},
    }
    grid = (-(-n // tile_n), -(-k // (PASSES * tile_k)))
    return Launch(grid, {**tensors, "M": 1}, constants, config.num_warps, config.num_stages)


def main(target: str, dtype_name: str, group: int, n: int, k: int) -> None:
    """Print the costs as JSON."""
    kernel, dtype = load(target), getattr(torch, dtype_name)
    rows, seen = [], set()
    for origin, configs in (("tuned", tuned(target, n, k, group)), ("autotuner", kernel.configs)):
        for config in configs:
            made = launch(config, target, dtype, group, n, k)
            blocks = made.constants["BLOCK_SIZE_N"], made.constants["BLOCK_SIZE_K"], made.constants["A_load_order"]
            key = (*blocks, made.num_warps)  # stages mean nothing without a loop
            if key in seen:
                continue
            seen.add(key)
            binary = aot.compile_launch(kernel.fn, made, target)
            threads = made.programs * made.num_warps * 32
            rows.append(
                {
                    "config": f"{blocks[0]}x{blocks[1]}, {made.num_warps} warps",
                    "origin": origin,
                    "instr_per_weight": len(binary.sass.instructions) * threads / (n * k),
                    "registers": binary.registers,
                    "spills": binary.spills,
                    "package": f"gemlite {version('gemlite')}",
                }
            )
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(value) for value in sys.argv[3:]))
