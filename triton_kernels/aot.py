"""Compile kernels for GPUs that are not here, and read registers, spills and machine code of the result.

Triton's wheel brings everything: `ptxas`, `cuobjdump` and `nvdisasm` for NVIDIA, LLVM for AMD. Compilations are kept in
Triton's cache, keyed by source and options.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .launch import TYPE_NAMES, Launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INT32 = 2**31 - 1
_INLINE_ASM = re.compile(
    r'tt\.elementwise_inline_asm "((?:[^"\\]|\\.)*)" \{.*?packed_element = (\d+) .*?\}(?: %\S+)* : (.*)'
)


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    `registers` per thread (vector registers on AMD); `spills` in bytes per thread (registers on AMD); `shared` bytes
    per block; `code` is the cubin, or AMD's assembly text.
    """

    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    ttgir: str
    code: bytes | str

    @cached_property
    def sass(self) -> sass.Sass:
        """The machine code (NVIDIA only)."""
        if not isinstance(self.code, bytes):
            raise ValueError(f"{self.target} has no SASS")
        return sass.parse(_tool("nvdisasm", self.code, "-c", "-hex"))


def compile_launch(jit: Any, launch: Launch, target: str) -> Binary:
    """Compile `jit` as the just-in-time compiler would for `launch`, for `target` (`sm_90`, `gfx942`, ...).

    Integers equal to 1 and integers and pointers divisible by 16 are specialised, as at run time.
    """
    signature, constants, divisible = specialise(jit, launch)
    source = ASTSource(
        fn=jit,
        signature=signature,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    asm, shared = compiled.asm, int(compiled.metadata.shared)
    if target.startswith("gfx"):
        text = asm["amdgcn"]
        registers, spills = (_amd_field(text, name) for name in (".vgpr_count", ".vgpr_spill_count"))
        return Binary(target, registers, spills, shared, launch.num_warps, asm["ttgir"], text)
    usage = _tool("cuobjdump", asm["cubin"], "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]}")
    spills = int(found[2]) + int(found[3])
    return Binary(target, int(found[1]), spills, shared, launch.num_warps, asm["ttgir"], asm["cubin"])


def specialise(jit: Any, launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Triton's signature, its constants (constexpr, and integers equal to 1), and the arguments divisible by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible: list[int] = []
    for position, name in enumerate(jit.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            divisible.append(position)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) <= _INT32 else "i64"
            if value % 16 == 0:
                divisible.append(position)
    return signature, constants, divisible


def gpu_target(target: str) -> GPUTarget:
    """Triton's name for `sm_90`, `gfx942` and the like."""
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def instructions_per_weight(launch: Launch, binary: Binary, weights: int, weight_bytes: int) -> float:
    """Thread instructions of the whole launch per kept weight, prologue and epilogue included (NVIDIA).

    `weight_bytes`: bytes that the launch loads with `evict_first`; they decide how often the main loop runs.
    """
    threads = launch.programs * launch.num_warps * 32
    return binary.sass.instructions_per_thread(weight_bytes / threads) * threads / weights


def misplaced_fragments(ttgir: str) -> list[str]:
    """Layouts that would feed a warp-wide inline instruction (`mma`) wrongly; empty when all is well.

    Fragments are packed so that lane `l` of a warp finds its registers at elements `p * l .. p * l + p - 1` of 32 * p
    consecutive ones, where `p` is the assembly's `packed_element`. The compiler chooses the layout, so it is checked.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", ttgir, re.MULTILINE))
    wrong = []
    for asm, pack, types in _INLINE_ASM.findall(ttgir):
        if "mma" not in asm:
            continue
        for name in dict.fromkeys(re.findall(r"tensor<[^<>]*?(#\w+)>", types)):
            fields = dict(re.findall(r"(\w+) = \[([\d, ]*)\]", layouts.get(name, "")))
            *outer_size, size = fields.get("sizePerThread", "0").split(", ")
            *outer_lanes, lanes = fields.get("threadsPerWarp", "0").split(", ")
            along_last = fields.get("order", "").split(", ")[0] == str(len(outer_size))
            if not (size == pack and lanes == "32" and along_last and set(outer_size + outer_lanes) <= {"1"}):
                wrong.append(f"{name} = {layouts.get(name, 'no blocked layout')}")
    return wrong


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"{re.escape(name)}:\s*(\d+)", text)
    return int(found[1]) if found else 0


def _tool(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(_TOOLS / name), *flags, file.name], capture_output=True, text=True, check=True)
    return run.stdout
