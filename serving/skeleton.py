"""A model's structure without its weights: built from the config, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, TensorInfo
from .embedding import swap_embedding
from .errors import InputError
from .experts import merged_from, stack_of, unfuse, usual_name
from .linear import CompressedLinear, swap_linears
from .scheme import ArtifactConfig


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a causal language model; raises InputError for any other kind of model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad config; all mean the same to the user
        raise InputError(f"{checkpoint.path / 'config.json'}: {' '.join(str(error).split())}") from None
    architecture = (checkpoint.config.get("architectures") or ["unknown"])[0]
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or config.is_encoder_decoder:
        raise InputError(
            f"{checkpoint.path}: {architecture} is not a causal language model; halfweight compresses decoders"
        )
    return config


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The checkpoint's causal model, compressed modules included, with parameters on meta and computed buffers real.

    Raises InputError when the model is not causal, its quantization_config does not fit it, or the checkpoint lacks a
    tensor or has one of another shape.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    artifact = checkpoint.artifact  # a bad one gets a better message here than from transformers
    config = load_config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the modules are swapped in here, not by transformers
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # as above; early releases of transformers check no types before
        file = checkpoint.path / "config.json"
        raise InputError(f"{file}: describes no model ({' '.join(str(error).split())})") from None
    with init_empty_weights(include_buffers=False):
        unfuse(model)
    if artifact is not None:
        swap_modules(model, artifact)
    check_stored(model, checkpoint.tensors)
    return model.requires_grad_(False)


def swap_modules(model: Any, artifact: ArtifactConfig) -> None:
    """Replace, in place, what `artifact` names by compressed modules; raises InputError when it does not fit."""
    tied = tied_names(model)
    for name in artifact.linears:
        if f"{name}.weight" in tied:
            raise InputError(f"quantization_config names {name}, which is tied to another layer")
    stacks = {stack_of(name) for name in artifact.linears} - {None}
    unfuse(model, [stack for stack in stacks if stack is not None])
    swap_linears(model, artifact.linears)
    if artifact.embedding is not None:
        swap_embedding(model, artifact.embedding)


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's block list and its dotted name: the largest module list with one entry per hidden layer.

    Raises InputError when there is none, or when its blocks hold no linear.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise InputError(f"{type(model).__name__} has no module list of {count} decoder blocks; it is not supported")
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if not any(is_linear(m) for m in blocks.modules()):
        raise InputError(f"{type(model).__name__}: decoder blocks at {name} hold no nn.Linear; it is not supported")
    return name, blocks


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense or compressed linear."""
    return isinstance(module, (nn.Linear, CompressedLinear))


def tied_names(model: Any) -> set[str]:
    """State-dict names that only mirror another tensor, such as a head tied to the embedding."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def tensor_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """State-dict name -> name in `stored` (a checkpoint's tensor names), for every tensor of the model found there.

    Understands transformers' own renamings (GPT-NeoX's head is stored as `embed_out`) and checkpoints saved from a bare
    decoder, which lack the causal model's prefix.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    found = {}
    for name in stored:
        renamed = name
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        found[usual_name(renamed)] = name
    found.update({name: name for name in stored})
    base = model.base_model_prefix + "."
    names = {}
    for name in model.state_dict(keep_vars=True):
        for candidate in (name, name.removeprefix(base), base + name):
            if candidate in found:
                names[name] = found[candidate]
                break
    return names


def check_stored(model: Any, stored: Mapping[str, TensorInfo]) -> None:
    """Raise InputError unless `stored` has every tensor of `model` with its shape: transformers would only log it."""
    names, tied = tensor_names(model, stored), tied_names(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in names:
            if name in tied:
                continue
            family = model.config.get_text_config().model_type
            parts = merged_from(name, len(tensor), family) if tensor.ndim == 3 else []
            if parts and all(part in stored for part in parts):
                continue  # transformers merges them
            folder = next(iter(stored.values())).file.parent if stored else "checkpoint"
            raise InputError(f"{folder}: tensor {name} is missing from the checkpoint")
        info = stored[names[name]]
        if info.shape != tuple(tensor.shape):
            raise InputError(
                f"{info.file}: tensor {names[name]} has shape {list(info.shape)}, expected {list(tensor.shape)}"
            )
        if info.dtype.is_floating_point != tensor.dtype.is_floating_point:
            wanted = "floating point" if tensor.dtype.is_floating_point else str(tensor.dtype)
            raise InputError(f"{info.file}: tensor {names[name]} must be {wanted}, got {info.dtype}")


def context_length(config: Any) -> int | None:
    """The most tokens the model was built for, or None where the config does not say."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def logit_chunk(config: Any) -> int:
    """Positions whose logits exist at once: 8 MB of fp32, but at least 32 rows, below which matmuls get slow.

    Full logits of a 262k vocabulary would be 1 GB per 1024 tokens.
    """
    return max(32, 2**21 // int(config.get_text_config().vocab_size))
