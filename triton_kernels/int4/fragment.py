"""Tensor cores for integer weights from plain Triton: inline assembly on operands that lie in fragment order in memory.

A tensor `[..., 128 * warps]` of int32 that is loaded contiguously is laid out with four elements to a thread and 32
threads to a warp, so with `pack=4` one run of the assembly text sees the four registers of one lane. That layout is the
compiler's choice, so tests check it in the compiled code. Fragment layouts: PTX ISA 9.7.15, `mma.m16n8k16`.

Integers become floats by writing them into the mantissa of a power of two: `1024 | q` for fp16 (and `1024 | 16 q`, for
the nibble that sits four bits higher, at no cost), `128 | q` for bf16, `2^23 | q` for fp32. Subtracting that power plus
the zero point is exact, so weights are exact integers, products are exact in the tensor core, and sums are fp32.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode4(words, low, high, BF16: tl.constexpr):
    """Four nibble words per lane -> the A operands of four k16 steps; `low`, `high` from `zero_constants`."""
    return tl.inline_asm_elementwise(
        _decode4_text(BF16),
        _constraints(16, 12),
        [words, low, high],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode4_word(words, zeros, WORD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BF16: tl.constexpr):
    """Nibble word `WORD` of four -> the A operand of one k16 step.

    The zero points of rows g and g + 8 are the lowest nibbles of the registers `FIRST` (for the step's first eight
    columns) and `SECOND` of `zeros`.
    """
    return tl.inline_asm_elementwise(
        _decode4_word_text(WORD, FIRST, SECOND, BF16),
        _constraints(4, 8),
        [words, zeros],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode8(words, low, high, BF16: tl.constexpr):
    """Four byte words per lane -> the A operands of two k16 steps."""
    return tl.inline_asm_elementwise(
        _decode8_text(BF16),
        _constraints(8, 12),
        [words, low, high],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=4,
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
    return tl.inline_asm_elementwise(
        _mma_text(HALF, BF16), _float_constraints(8, 4), [a, b, c], dtype=tl.float32, is_pure=True, pack=4
    )


@triton.jit
def mma_diagonal(a, b_low, b_high, c, FIRST: tl.constexpr, SECOND: tl.constexpr, BF16: tl.constexpr):
    """Row i of `a` times column i of B, for each row: the upper eight rows with `b_low`, the lower eight with `b_high`.

    Two `mma`, of which the diagonals are wanted: register r of lane `4g + t` of the result holds row `g + 8 (r //
    2)`, and is that row's own sum where `2t + r % 2 == g`. `FIRST`, `SECOND`: registers of B for the step's columns
    0-7 and 8-15, or -1 for zeros.
    """
    return tl.inline_asm_elementwise(
        _mma_diagonal_text(FIRST, SECOND, BF16),
        _float_constraints(12, 4),
        [a, b_low, b_high, c],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def rescale(scales, sums, total, GROUP: tl.constexpr):
    """`total + sums * scale` with the fp16 scales of rows g and g + 8 in register `GROUP` of `scales`."""
    return tl.inline_asm_elementwise(
        _rescale_text(GROUP), _float_constraints(4, 8), [scales, sums, total], dtype=tl.float32, is_pure=True, pack=4
    )


@triton.jit
def spread(words, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Each lane's registers `A`, `B`, `C`, `D` of `words`, in this order; costs nothing."""
    return tl.inline_asm_elementwise(
        _spread_text(A, B, C, D), _constraints(4, 4), [words], dtype=tl.int32, is_pure=True, pack=4
    )


# --- assembly texts: outputs come first, four registers per operand ---


@triton.constexpr_function
def _constraints(outputs, inputs):
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def _float_constraints(integers, floats):
    return ",".join(["=f"] * 4 + ["r"] * integers + ["f"] * floats)


@triton.constexpr_function
def _nibbles(q, a, constants, bf16):
    """Lines that turn word `q` into registers `a`, adding `constants` (one each).

    Scratch is `t`; `s` holds 1 for bf16, whose fused multiply-add every GPU has, and 1 / 16 for fp16.
    """
    lines = []
    for r in range(4):
        shift = 4 * r if bf16 else 8 * (r // 2)
        lines += [f"shr.b32 t, {q}, {shift};"] if shift and (bf16 or r == 2) else []
        mask, power = ("0x00f000f0" if r % 2 and not bf16 else "0x000f000f"), ("0x43004300" if bf16 else "0x64006400")
        lines.append(f"lop3.b32 {a[r]}, {'t' if shift else q}, {mask}, {power}, 0xea;")
    for r in range(4):
        if bf16 or r % 2:
            lines.append(f"fma.rn.{'bf16x2' if bf16 else 'f16x2'} {a[r]}, {a[r]}, s, {constants[r]};")
        else:
            lines.append(f"add.rn.f16x2 {a[r]}, {a[r]}, {constants[r]};")
    return lines


@triton.constexpr_function
def _scratch(bf16):
    return f".reg .b32 t, s; mov.b32 s, {'0x3f803f80' if bf16 else '0x2c002c00'};"


@triton.constexpr_function
def _decode4_text(bf16):
    """0-15: A registers, by step; 16-19: words; 20: constant of rows g, 24: of rows g + 8."""
    lines = [_scratch(bf16)]
    for word in range(4):
        lines += _nibbles(f"${16 + word}", [f"${4 * word + r}" for r in range(4)], ["$20", "$24"] * 2, bf16)
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _decode4_word_text(word, first, second, bf16):
    """0-3: A registers; 4-7: words; 8-11: zero points."""
    lines, constants = [_scratch(bf16), ".reg .b32 z, u, v, x, y;"], []
    for zeros, low, high in ((first, "u", "v"), (second, "x", "y")):
        # The lowest byte into both halves: its low nibble is row g's zero point, its high nibble that of row g + 8.
        lines.append(f"prmt.b32 z, ${8 + zeros}, 0, 0x4040;")
        lines.append(f"lop3.b32 {low}, z, 0x000f000f, {'0xc300c300' if bf16 else '0xe400e400'}, 0xea;")
        lines += ["shr.b32 z, z, 4;"] if bf16 else []
        lines.append(f"lop3.b32 {high}, z, {'0x000f000f, 0xc300c300' if bf16 else '0x00f000f0, 0xd400d400'}, 0xea;")
        constants += [low, high]
    lines += _nibbles(f"${4 + word}", ["$0", "$1", "$2", "$3"], constants, bf16)
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _decode8_text(bf16):
    """0-7: A registers, by step; 8-11: words, two per step; 12: constant of rows g, 16: of rows g + 8."""
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


@triton.constexpr_function
def _instruction(bf16):
    kind = "bf16" if bf16 else "f16"
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"


@triton.constexpr_function
def _mma_text(half, bf16):
    """0-3: D; 4-7: A; 8-11: B; 12-15: C."""
    b = f"{{${8 + 2 * half}, ${9 + 2 * half}}}"
    return f"{_instruction(bf16)} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {b}, {{$12, $13, $14, $15}};"


@triton.constexpr_function
def _mma_diagonal_text(first, second, bf16):
    """0-3: D; 4-7: A; 8-11: B of the upper rows; 12-15: of the lower; 16-19: C."""
    upper, lower = (
        ", ".join("n" if register < 0 else f"${start + register}" for register in (first, second)) for start in (8, 12)
    )
    return (
        "{ .reg .b32 n; .reg .f32 z, p, q; xor.b32 n, $4, $4; mov.b32 z, n; "
        f"{_instruction(bf16)} {{$0, $1, p, q}}, {{$4, $5, $6, $7}}, {{{upper}}}, {{$16, $17, z, z}}; "
        f"{_instruction(bf16)} {{p, q, $2, $3}}, {{$4, $5, $6, $7}}, {{{lower}}}, {{z, z, $18, $19}}; }}"
    )


@triton.constexpr_function
def _rescale_text(group):
    """0-3: results; 4-7: scales; 8-11: sums; 12-15: totals."""
    lines = [f".reg .b16 l, h; .reg .f32 s, t; mov.b32 {{l, h}}, ${4 + group}; cvt.f32.f16 s, l; cvt.f32.f16 t, h;"]
    lines += [f"fma.rn.f32 ${r}, ${8 + r}, {'t' if r > 1 else 's'}, ${12 + r};" for r in range(4)]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _spread_text(*registers):
    return " ".join(f"mov.b32 ${i}, ${4 + register};" for i, register in enumerate(registers))
