"""Export as one GGUF file for llama.cpp, written with the public `gguf` package.

Codes that a GGUF type can hold go over as they are: symmetric int4 as Q4_0 and symmetric int8 as Q8_0, bit for bit,
asymmetric int4 as Q4_1, whose offset is an fp16 number. Other integers become Q8_0, 16-bit weights keep their dtype,
vectors are F32. Blocks of these types are 32 inputs long (ggml-quants, ggml.org).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...serving.checkpoint import TensorInfo, read_tensor
from ...serving.errors import InputError
from ...serving.load import stored_dtype
from ...serving.skeleton import load_config
from ...triton_kernels.formats.integers import Quantized
from .contents import Contents, Matrix, lost_selections
from .gguf_tokenizer import add_tokenizer
from .safetensors import Step

BLOCK = 32
_SIZES = tuple(BLOCK * n for n in range(1, 33))

# transformers' model type -> GGUF architecture; all of them are in llama.cpp and in transformers' own GGUF reader.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


_KEPT = {
    "Q4_0": "codes and scales are kept",
    "Q4_1": "codes and scales are kept, offsets rounded to fp16",
    "Q8_0": "symmetric int8 is kept, everything else rounded anew",
    "BF16": "16-bit weights are kept, others rounded to bf16",
    "F16": "16-bit weights are kept, others rounded to fp16",
}


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: `shape` is the dense one, `kind` a GGUF type's name, `data` makes its bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


def write_gguf(contents: Contents, file: Path, step: Step) -> list[str]:
    """Write `contents` to `file`; returns what was kept. Raises InputError for a model that GGUF does not know."""
    require_package()
    import gguf

    config = load_config(contents.checkpoint)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"{contents.checkpoint.path}: GGUF export knows {', '.join(sorted(ARCHITECTURES))}, not"
            f" {config.model_type}; use --to dense"
        )
    out = gguf.GGUFWriter(file, architecture)
    _add_settings(out, config, contents.checkpoint.path)
    add_tokenizer(out, contents.checkpoint.path, config)
    entries = _entries(contents, config, architecture)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(entry.shape)) // block * size
        out.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for done, entry in enumerate(entries, 1):
        step(done, len(entries), entry.name)
        out.write_tensor_data(entry.data())
    out.close()
    return _statement(contents, entries)


def require_package() -> None:
    """Raise InputError when the optional package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("writing GGUF needs the gguf package: pip install 'halfweight[demo]'")


def kind_of(matrix: Matrix, plain: str) -> str:
    """The GGUF type for a compressed matrix; `plain` is that of 16-bit weights."""
    scheme, integers = matrix.scheme, matrix.scheme.integers
    if matrix.shape[1] % BLOCK or integers is None:
        return plain
    if scheme.low_rank is not None or scheme.group is not None or scheme.input_major or integers.group_size % BLOCK:
        return "Q8_0"
    if integers.bits == 4:
        return "Q4_0" if integers.symmetric else "Q4_1"
    return "Q8_0"


def pack_blocks(quantized: Quantized, kind: str) -> np.ndarray:
    """Codes `[N, K]` with scales and zero points per group -> bytes `[N, K / 32 * block]` of Q4_0, Q4_1 or Q8_0."""
    rows, columns = quantized.codes.shape
    spread = columns // BLOCK // quantized.scales.shape[1]
    scales = quantized.scales.repeat_interleave(spread, 1)  # one per block of 32
    blocks = quantized.codes.unflatten(1, (-1, BLOCK))
    if kind == "Q8_0":
        numbers = (blocks.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
        parts = [_bytes(scales), numbers]
    else:
        low, high = blocks[..., : BLOCK // 2], blocks[..., BLOCK // 2 :]
        offset = []
        if quantized.zeros is not None:
            zeros = quantized.zeros.repeat_interleave(spread, 1)
            offset = [_bytes((-scales.float() * zeros.float()).half())]
        parts = [_bytes(scales), *offset, low | high << 4]
    return torch.cat(parts, -1).reshape(rows, -1).numpy()


def _bytes(halves: Tensor) -> Tensor:
    """fp16 `[N, J]` -> its bytes `[N, J, 2]`."""
    return halves.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _entries(contents: Contents, config: Any, architecture: str) -> list[_Entry]:
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{contents.checkpoint.path}: GGUF has no name for {name}; use --to dense")
        return str(found)

    plain = "F16" if stored_dtype(contents.checkpoint) == torch.float16 else "BF16"
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    entries = [_matrix(m, name_of(m.name), plain, _order(m.name, config)) for m in contents.matrices]
    for name, info in contents.others.items():
        if name != tied:
            shift = 1.0 if architecture == "gemma3" and name.endswith("norm.weight") else 0.0
            entries.append(_tensor(name, info, name_of(name), plain, _order(name, config), shift))
    return entries


def _matrix(matrix: Matrix, name: str, plain: str, order: Tensor | None) -> _Entry:
    kind = kind_of(matrix, plain)

    def data() -> np.ndarray:
        codes = matrix.codes(_SIZES) if kind in ("Q4_0", "Q4_1", "Q8_0") else None
        if codes is not None and not (kind == "Q8_0" and codes.zeros is not None):
            return pack_blocks(codes if order is None else _reordered(codes, order), kind)
        weight = matrix.dense(torch.float32)
        return _numbers(weight if order is None else weight[order], kind)

    return _Entry(name, kind, matrix.shape, data)


def _tensor(name: str, info: TensorInfo, gguf_name: str, plain: str, order: Tensor | None, shift: float) -> _Entry:
    kind = plain if len(info.shape) > 1 else "F32"

    def data() -> np.ndarray:
        values = read_tensor(name, info, torch.float32) + shift
        return _numbers(values if order is None else values[order], kind)

    return _Entry(gguf_name, kind, info.shape, data)


def _numbers(values: Tensor, kind: str) -> np.ndarray:
    import gguf

    quantized: np.ndarray = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    return quantized


def _reordered(codes: Quantized, order: Tensor) -> Quantized:
    zeros = None if codes.zeros is None else codes.zeros[order]
    return Quantized(codes.codes[order], codes.scales[order], zeros)


def _order(name: str, config: Any) -> Tensor | None:
    """Rows of a query or key projection in the order of ggml's rotary embedding for Llama: pairs side by side."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return None
    return torch.arange(heads * _head_size(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _gemma_layers(count: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]


def _add_settings(out: Any, config: Any, path: Path) -> None:
    """The model's numbers, from transformers' config; raises InputError for rotary embeddings that are scaled."""
    rope = dict(getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 1e4)})
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{path}: its RoPE is scaled ({rope['rope_type']}); GGUF export does not know that")
    if config.model_type == "gemma3_text" and config.layer_types != _gemma_layers(config.num_hidden_layers):
        raise InputError(f"{path}: GGUF knows Gemma 3 with full attention in each sixth layer only; use --to dense")
    import gguf

    out.add_name(path.resolve().name)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(_head_size(config))
    out.add_value_length(_head_size(config))
    out.add_rope_dimension_count(_head_size(config))
    out.add_rope_freq_base(float(rope["rope_theta"]))
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        out.add_sliding_window(config.sliding_window)
        if local is not None:
            out.add_rope_freq_base_swa(float(local["rope_theta"]))


def _statement(contents: Contents, entries: list[_Entry]) -> list[str]:
    kinds = [entry.kind for entry in entries[: len(contents.matrices)]]  # the others come after them
    lines = [f"{kinds.count(kind)} compressed matrices as {kind}: {_KEPT[kind]}" for kind in sorted(set(kinds))]
    lines.append("sparsity is lost: zeros are stored, and llama.cpp does not skip them")
    return [*lines, *lost_selections(contents)]
