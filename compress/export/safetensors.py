"""Exports as Hugging Face folders: dense weights for any engine, or int4 as compressed-tensors stores it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...serving.durable import write_text
from ...serving.load import stored_dtype
from ...serving.scheme import IntegerScheme
from ...triton_kernels.formats.integers import Quantized
from .. import writer
from ..passes.quantization import CodeRange, quantize
from .contents import Contents, Matrix, lost_selections

SIZES = (32, 64, 128)  # groups that the int4 kernels of vLLM take
_ROUNDED = IntegerScheme(bits=4, group_size=32, symmetric=True)
_CANDIDATES = 16  # ranges tried per group when a weight is rounded anew
Step = Callable[[int, int, str], None]


def write_dense(contents: Contents, folder: Path, step: Step) -> list[str]:
    """Write all weights in the checkpoint's own dtype into `folder`; returns what was kept and what was not."""
    dtype = stored_dtype(contents.checkpoint)
    _write(contents, folder, ((m.name, {"weight": m.dense(dtype)}) for m in contents.matrices), step)
    name = str(dtype).removeprefix("torch.")
    return [
        f"every weight has its compressed value, zeros included, rounded once to {name}",
        "nothing is smaller or faster than the dense model: the zeros are stored",
        *lost_selections(contents),
    ]


def write_w4(contents: Contents, folder: Path, step: Step) -> list[str]:
    """Write the decoder's compressed linears as compressed-tensors `pack-quantized` into `folder`.

    Integers in groups of 32, 64 or 128 keep their codes; other weights are rounded anew to symmetric int4 in groups of
    32. Linears whose input size is no multiple of 32, embedding and head are dense.
    """
    dtype = stored_dtype(contents.checkpoint)
    schemes: dict[str, IntegerScheme] = {}
    errors: dict[str, float] = {}

    def tensors() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for matrix in contents.matrices:
            if not matrix.block or matrix.shape[1] % SIZES[0]:
                yield matrix.name, {"weight": matrix.dense(dtype)}
                continue
            scheme, codes, error = _integers(matrix)
            schemes[matrix.module] = scheme
            if error is not None:
                errors[matrix.module] = error
            yield matrix.name, pack_quantized(codes, scheme.bits, dtype)

    _write(contents, folder, tensors(), step, lambda: compressed_tensors_config(contents, schemes))
    kept = len(schemes) - len(errors)
    lines = [f"{kept} linears keep their integer codes; scales are rounded to {str(dtype).removeprefix('torch.')}"]
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        lines.append(
            f"{len(errors)} linears are rounded anew to int4 in groups of 32 (relative error of the weights at most"
            f" {errors[worst]:.3f}, at {worst}); low-rank branches are folded in"
        )
    dense = [m.module for m in contents.matrices if m.module not in schemes]
    if dense:
        lines.append(f"{len(dense)} compressed matrices are stored dense ({dense[0]}{' ...' if dense[1:] else ''})")
    lines.append("sparsity is lost: zeros are stored as codes, and no engine skips them")
    return [*lines, *lost_selections(contents)]


def _integers(matrix: Matrix) -> tuple[IntegerScheme, Quantized, float | None]:
    """Scheme and codes to store, and for a weight that is rounded anew the relative error of that."""
    codes = matrix.codes(SIZES)
    if codes is not None and (codes.zeros is None or matrix.shape[0] % 8 == 0):
        assert matrix.scheme.integers is not None  # it has codes
        return matrix.scheme.integers, codes, None
    weight = matrix.dense(torch.float32)
    allowed = CodeRange.of(_ROUNDED.bits, _ROUNDED.symmetric)
    rounded, values = quantize(weight, None, allowed, _ROUNDED.group_size, _CANDIDATES)
    return _ROUNDED, rounded, float((values - weight).norm() / weight.norm().clamp_min(1e-30))


def pack_quantized(codes: Quantized, bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """compressed-tensors' tensors of codes `[N, K]`: 32 / `bits` codes per int32, the first in the lowest bits.

    `weight_packed` packs along K, `weight_zero_point` along N; both hold unsigned codes.
    """
    packed = {
        "weight_packed": pack_int32(codes.codes, bits),
        "weight_scale": codes.scales.to(dtype),
        "weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
    }
    if codes.zeros is not None:
        packed["weight_zero_point"] = pack_int32(codes.zeros.T, bits).T.contiguous()
    return packed


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., C]` -> int32 `[..., ceil(C * bits / 32)]`, padded with code 0."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    words = (padded.to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def compressed_tensors_config(contents: Contents, schemes: dict[str, IntegerScheme]) -> dict[str, Any]:
    """`quantization_config` for linears of `schemes`; every other linear of the model is in its `ignore`."""
    kinds: dict[IntegerScheme, list[str]] = {}
    for name, scheme in schemes.items():
        kinds.setdefault(scheme, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group",
                "group_size": scheme.group_size,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in contents.linears if name not in schemes],
    }


def _write(
    contents: Contents,
    folder: Path,
    matrices: Iterator[tuple[str, dict[str, Tensor]]],
    step: Step,
    quantization: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Write a folder with the given tensors for each matrix (by dense name, then suffix) and all other tensors."""

    def entries() -> Iterator[dict[str, Tensor]]:
        for done, (name, tensors) in enumerate(matrices, 1):
            step(done, len(contents.matrices), name.removesuffix(".weight"))
            yield {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}

    writer.write_stream(entries(), contents.others, folder, "model")
    settings = dict(contents.checkpoint.config)
    for key in ("quantization_config", "transformers_weights"):
        settings.pop(key, None)
    if quantization is not None:
        settings["quantization_config"] = quantization()
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    writer.copy_companions(contents.checkpoint.path, folder)
