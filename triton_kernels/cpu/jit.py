"""Compiles kernels for the machine they run on, when they are first called, and calls them.

LLVM (by way of llvmlite) is the only compiler; a kernel takes a few hundredths of a second, so nothing is
cached on disk. Threads are torch's own OpenMP pool, entered through the library torch itself loaded: a second pool
would fight torch's for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Machine(NamedTuple):
    """What to compile for. `features` is LLVM's list, such as `+avx2,-avx512f`."""

    triple: str
    cpu: str
    features: str

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")


class Kernel(NamedTuple):
    """A compiled kernel: `entry` takes the packed arguments and returns 0, or a status."""

    entry: Callable[[bytes], int]
    arguments: struct.Struct
    engine: Any  # owns the code


class Pool(NamedTuple):
    """Addresses of the OpenMP calls that run a region on torch's threads; zeros where torch has no such pool."""

    parallel: int
    rank: int
    size: int


@functools.cache
def host() -> Machine:
    """This machine."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return Machine(llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten())


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and why not."""
    try:
        machine = host()
    except ImportError:
        return False, "llvmlite is not installed (pip install 'halfweight[cpu]')"
    arch = machine.triple.split("-")[0]
    if arch == "x86_64" and not (machine.has("avx2") and machine.has("fma") and machine.has("f16c")):
        return False, f"the CPU ({machine.cpu}) lacks AVX2, FMA or F16C"
    if arch not in ("x86_64", "aarch64", "arm64"):
        return False, f"no kernels for {arch}"
    return True, ""


@functools.cache
def pool() -> Pool:
    """The OpenMP library that torch runs on, found through torch's own dependencies."""
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        loaded = ctypes.CDLL(str(library))
        addresses = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0 for name in names]
    except (OSError, AttributeError):
        return Pool(0, 0, 0)
    return Pool(*addresses)


@functools.cache
def kernel(module: str, name: str, *config: Any, machine: Machine | None = None) -> Kernel:
    """The kernel that `module`'s function `name` builds for `config`, compiled on first use."""
    machine = machine or host()
    builder = getattr(importlib.import_module(f".{module}", __package__), name)
    text, fields = builder(machine, *config)
    return compile_text(text, fields, machine)


def compile_text(text: str, fields: int, machine: Machine) -> Kernel:
    """Compile LLVM assembly with a function `entry(arguments) -> status`."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.verify()
    target = llvm.Target.from_triple(machine.triple)
    target_machine = target.create_target_machine(cpu=machine.cpu, features=machine.features, opt=2)
    builder = llvm.create_pass_builder(target_machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes = llvm.create_new_function_pass_manager()
    for name in PASSES:
        getattr(passes, f"add_{name}_pass")()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    engine = llvm.create_mcjit_compiler(module, target_machine)
    engine.finalize_object()
    entry = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)(engine.get_function_address("entry"))
    return Kernel(entry, struct.Struct(f"{fields}q"), engine)


def run(kernel: Kernel, work: int, *arguments: int) -> None:
    """Call `kernel` with `arguments`, on torch's threads when `work` (bytes it reads) pays for starting them.

    Raises MemoryError when its scratch memory cannot be had and IndexError for a row that does not exist.
    """
    threads = min(torch.get_num_threads(), work // BYTES_PER_THREAD) if work > BYTES_PER_THREAD else 1
    openmp = pool()
    status = kernel.entry(kernel.arguments.pack(*arguments, threads if openmp.parallel else 1, *openmp))
    if status == 1:
        raise MemoryError("no memory for the kernel's scratch space")
    if status == 2:
        raise IndexError("a row number is out of range")


# The kernels are written the way they should run; the usual pipeline took three times as long to find nothing more.
PASSES = (
    *("sroa", "instruction_combine", "simplify_cfg", "new_gvn"),
    *("loop_simplify", "loop_rotate", "instruction_combine", "simplify_cfg"),
)
# Below this a second thread would wait longer for its start than work.
BYTES_PER_THREAD = 1 << 17
