"""What a kernel is, and what one launch of it is: plain data shared by the GPU, the interpreter and the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
EVERY_GPU = NVIDIA + AMD

# Argument kinds as Triton's signatures spell them.
TYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch: `arguments` and `constants` (constexpr) by parameter name, `grid` of up to three axes.

    Tensors may be real (to run or interpret) or on the meta device (to compile and to count). Pointers are taken to be
    16-byte aligned; that holds for whole tensors of torch's allocators.
    """

    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    @property
    def programs(self) -> int:
        return prod(self.grid)


class Shape(NamedTuple):
    """A linear `y[m, n] = x[m, k] W[n, k]^T`: `m` tokens, `n` outputs, `k` inputs."""

    m: int
    n: int
    k: int


Example = Callable[[Shape, torch.dtype, str], Launch]


@dataclass(frozen=True)
class Kernel:
    """A kernel and the facts that tests, tables and dispatch need about it.

    - `function`: `module:name` of the jit function, relative to `triton_kernels`; imported on first use.
    - `example(shape, dtype, target)`: the launch that the op would make for these, on meta tensors.
    - `bytes(shape, dtype)`: DRAM bytes of a cold launch, a formula: every stored byte once, plus x and y.
    - `minimum_bytes(shape, dtype)`: the same with the weights as the file format stores them.
    - `weights(shape)`: kept weights; `weight_bytes(shape, dtype)`: the bytes loaded with `evict_first`.
    - `budget`: thread instructions per kept weight at M = 1 and 4096 x 4096 on sm_90, whole program.
    - `m_range`: smallest and largest M of one launch. `targets`: GPUs it is compiled and tested for.
    - `inline_asm`: stays off on hardware until it has reproduced its reference there.
    - `loop_is_clean`: promises a main loop without shared memory, shuffles and barriers on NVIDIA.
    - `sample(shape, dtype, target)`: the launch of `example` on CPU tensors with random valid content, for the
      interpreter and the meter.
    """

    name: str
    op: str
    function: str
    example: Example
    bytes: Callable[[Shape, torch.dtype], int]
    minimum_bytes: Callable[[Shape, torch.dtype], int]
    weights: Callable[[Shape], int]
    weight_bytes: Callable[[Shape, torch.dtype], int]
    budget: Mapping[torch.dtype, float] | None
    m_range: tuple[int, int]
    targets: tuple[str, ...] = EVERY_GPU
    inline_asm: bool = False
    loop_is_clean: bool = False
    sample: Example | None = None

    def jit(self) -> Any:
        """The triton JITFunction. Raises ModuleNotFoundError where Triton is not installed."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f".{module}", __package__), name)

    def run(self, launch: Launch) -> None:
        """Launch on the current CUDA (or ROCm) stream."""
        self.jit()[launch.grid](
            **launch.arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def device_target(device: torch.device) -> str:
    """`sm_90`, `gfx942` and the like for a CUDA or ROCm device."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
