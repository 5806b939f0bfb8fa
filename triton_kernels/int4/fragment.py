"""Tensor cores for integer weights from plain Triton: inline assembly on operands that lie in fragment order in memory.

A tensor `[..., 128 * warps]` of int32 that is loaded contiguously is laid out with four elements to a thread and 32
threads to a warp, so with `pack=4` one run of the assembly text sees the four registers of one lane. That layout is
the compiler's choice; `tests/test_kernel_int4.py` checks it in the compiled code. Fragment layouts: PTX ISA 9.7.15,
`mma.m16n8k16` and `m16n8k8`.

Integers become floats by writing them into the mantissa of a power of two: `1024 | q` for fp16 (and `1024 | 16 q`, for
the nibble that sits four bits higher, at no cost), `128 | q` for bf16, `2^23 | q` for fp32. Subtracting that power plus
the zero point is exact, so weights are exact integers, products are exact in the tensor core, and sums are fp32.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

_FP16, _BF16 = 0, 1


def _registers(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def _decode4_text(bf16: int) -> str:
    """Operands: outputs 0-15 (per k16 step its A registers), words 16-19, constants of rows g (20) and g + 8 (24)."""
    lines = [".reg .b32 t, s; mov.b32 s, %s;" % ("0x3f803f80" if bf16 else "0x2c002c00")]
    for word in range(4):
        q, a = f"${16 + word}", [f"${4 * word + r}" for r in range(4)]
        if bf16:
            for r in range(4):
                source = q
                if r:
                    lines.append(f"shr.b32 t, {q}, {4 * r};")
                    source = "t"
                lines.append(f"lop3.b32 {a[r]}, {source}, 0x000f000f, 0x43004300, 0xea;")
                lines.append(f"fma.rn.bf16x2 {a[r]}, {a[r]}, s, ${20 + 4 * (r % 2)};")
            continue
        lines.append(f"shr.b32 t, {q}, 8;")
        for r in range(4):
            mask = "0x00f000f0" if r % 2 else "0x000f000f"
            lines.append(f"lop3.b32 {a[r]}, {'t' if r > 1 else q}, {mask}, 0x64006400, 0xea;")
        for r in (0, 2):
            lines.append(f"add.rn.f16x2 {a[r]}, {a[r]}, $20;")
            lines.append(f"fma.rn.f16x2 {a[r + 1]}, {a[r + 1]}, s, $24;")
    return "{ " + " ".join(lines) + " }"


def _decode8_text(bf16: int) -> str:
    """Operands: outputs 0-7 (tensor per k16 step), words 8-11 (two per step), constants of rows g 12 and g + 8 16."""
    lines = [".reg .b32 u, v;"]
    for register in range(8):
        step, r = divmod(register, 4)
        word, half = f"${8 + 2 * step + r // 2}", r % 2
        constant = f"${12 + 4 * half}"
        if bf16:
            for name, byte in (("u", 2 * half), ("v", 2 * half + 1)):
                lines.append(f"prmt.b32 {name}, {word}, 0x4b000000, {0x7440 + byte:#06x};")
                lines.append(f"add.rn.f32 {name}, {name}, {constant};")
            lines.append(f"cvt.rn.bf16x2.f32 ${register}, v, u;")
        else:
            lines.append(f"prmt.b32 ${register}, {word}, 0x64646464, {0x4342 if half else 0x4140:#06x};")
            lines.append(f"add.rn.f16x2 ${register}, ${register}, {constant};")
    return "{ " + " ".join(lines) + " }"


def _mma_text(bf16: int, half: int) -> str:
    """D 0-3, A 4-7, B 8-11 (`half` says which two registers), C 12-15."""
    kind = "bf16" if bf16 else "f16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {_registers(0)}, {_registers(4)},"
        f" {{${8 + 2 * half}, ${9 + 2 * half}}}, {_registers(12)};"
    )


def _rescale_text(group: int) -> str:
    """Outputs 0-3, scales 4-7 (register `group`: row g low, g + 8 high), sums of the group 8-11, running sums 12-15."""
    lines = [f".reg .b16 l, h; .reg .f32 s, t; mov.b32 {{l, h}}, ${4 + group}; cvt.f32.f16 s, l; cvt.f32.f16 t, h;"]
    lines += [f"fma.rn.f32 ${r}, ${8 + r}, {'t' if r > 1 else 's'}, ${12 + r};" for r in range(4)]
    return "{ " + " ".join(lines) + " }"


_DECODE4_FP16, _DECODE4_BF16 = tl.constexpr(_decode4_text(_FP16)), tl.constexpr(_decode4_text(_BF16))
_DECODE8_FP16, _DECODE8_BF16 = tl.constexpr(_decode8_text(_FP16)), tl.constexpr(_decode8_text(_BF16))
_MMA_FP16_0, _MMA_FP16_1 = tl.constexpr(_mma_text(_FP16, 0)), tl.constexpr(_mma_text(_FP16, 1))
_MMA_BF16_0, _MMA_BF16_1 = tl.constexpr(_mma_text(_BF16, 0)), tl.constexpr(_mma_text(_BF16, 1))
_RESCALE_0, _RESCALE_1 = tl.constexpr(_rescale_text(0)), tl.constexpr(_rescale_text(1))
_RESCALE_2, _RESCALE_3 = tl.constexpr(_rescale_text(2)), tl.constexpr(_rescale_text(3))
_DECODE4_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 12))
_DECODE8_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 12))
_MMA_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4))
_RESCALE_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 4 + ["f"] * 8))


@triton.jit
def decode4(words, low, high, BF16: tl.constexpr):
    """Four nibble words per lane -> the A operands of four k16 steps; `low`, `high` from `zero_constants`."""
    if BF16:
        text: tl.constexpr = _DECODE4_BF16
    else:
        text: tl.constexpr = _DECODE4_FP16
    return tl.inline_asm_elementwise(
        text,
        _DECODE4_CONSTRAINTS,
        [words, low, high],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode8(words, low, high, BF16: tl.constexpr):
    """Four byte words per lane -> the A operands of two k16 steps."""
    if BF16:
        text: tl.constexpr = _DECODE8_BF16
    else:
        text: tl.constexpr = _DECODE8_FP16
    return tl.inline_asm_elementwise(
        text, _DECODE8_CONSTRAINTS, [words, low, high], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
    )


@triton.jit
def zero_constants(low, high, BITS: tl.constexpr, BF16: tl.constexpr):
    """Zero points (int32) of rows g and g + 8 -> the register pairs that `decode4` or `decode8` add."""
    if BITS == 8 and BF16:  # -(2^23 + z), fp32
        constants = low | -889192448, high | -889192448
    elif BF16:  # -(128 + z), twice
        constants = low * 65537 | -1023360256, high * 65537 | -1023360256
    elif BITS == 8:  # -(1024 + z), twice
        constants = low * 65537 | -469703680, high * 65537 | -469703680
    else:  # -(1024 + z) and -(64 + z): the high row's nibbles are decoded times 16
        constants = low * 65537 | -469703680, high * 1048592 | -738143232
    return constants


@triton.jit
def mma(a, b, c, HALF: tl.constexpr, BF16: tl.constexpr):
    """`c + a b` of one k16 step; `HALF`: which two of the four registers of `b`."""
    if BF16:
        if HALF == 0:
            text: tl.constexpr = _MMA_BF16_0
        else:
            text: tl.constexpr = _MMA_BF16_1
    else:
        if HALF == 0:
            text: tl.constexpr = _MMA_FP16_0
        else:
            text: tl.constexpr = _MMA_FP16_1
    return tl.inline_asm_elementwise(text, _MMA_CONSTRAINTS, [a, b, c], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def rescale(scales, sums, total, GROUP: tl.constexpr):
    """`total + sums * scale` with the fp16 scales of rows g and g + 8 in register `GROUP` of `scales`."""
    if GROUP == 0:
        text: tl.constexpr = _RESCALE_0
    elif GROUP == 1:
        text: tl.constexpr = _RESCALE_1
    elif GROUP == 2:
        text: tl.constexpr = _RESCALE_2
    else:
        text: tl.constexpr = _RESCALE_3
    return tl.inline_asm_elementwise(
        text, _RESCALE_CONSTRAINTS, [scales, sums, total], dtype=tl.float32, is_pure=True, pack=4
    )
