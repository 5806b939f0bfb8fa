"""What a compressed model has to beat: its weights expanded, or another dense model, and dense int4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..serving import storage
from ..serving.checkpoint import Checkpoint
from ..serving.embedding import CompressedEmbedding, TiedHead
from ..serving.errors import InputError
from ..serving.int4 import as_int4, exact_int4, rounded_int4
from ..serving.linear import CompressedLinear, CompressedWeight, SelectingLinear, expand_linears
from ..serving.load import load
from ..serving.scheme import IntegerScheme
from ..serving.verdicts import use_dense

INT4_GROUP = 128  # of weights that are on no grid of their own


@dataclass
class Contender:
    """One model to time. `weights` are the bytes of its parameters, `read` those that a decode step reads."""

    name: str
    model: Any
    dtype: torch.dtype
    weights: int
    read: int


def compressed(folder: Path, device: torch.device, dtype: torch.dtype) -> Contender:
    """The artifact as it is stored, verdicts ignored."""
    return contender("compressed", load(folder, device, dtype, verdicts=False), dtype)


def dense(folder: Path, dense_folder: Path | None, device: torch.device, dtype: torch.dtype) -> Contender:
    """The model in `dense_folder`, or the artifact's own weights as dense matrices."""
    if dense_folder is not None:
        return contender("dense", load(dense_folder, device, dtype, verdicts=False), dtype)
    model = load(folder, device, dtype, verdicts=False)
    expand_linears(model, dtype)
    for module in model.modules():
        if isinstance(module, CompressedEmbedding):
            use_dense(module, "the dense rival")
        elif isinstance(module, SelectingLinear):
            module.selection = None  # a dense model reads everything
    return contender("dense", model, dtype)


def int4(folder: Path, device: torch.device, dtype: torch.dtype) -> Contender | None:
    """The artifact with every compressed linear as dense int4, or None when all of them are that already.

    Exact where it can be, else rounded, which does for a stop watch. A low-rank branch is gone; the embedding stays.
    """
    model = load(folder, device, dtype, verdicts=False)
    artifact = Checkpoint(folder).artifact
    names = artifact.linears if artifact is not None else {}
    changed = [name for name in names if _to_int4(model, name, dtype)]
    return contender("int4", model, dtype) if changed else None


def contender(name: str, model: Any, dtype: torch.dtype) -> Contender:
    """Count the bytes of `model`'s tensors; an embedding that no head shares is not read by a decode step."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    sizes = {module: _own_bytes(module, dtype, seen) for module in model.modules()}
    shared = isinstance(head, TiedHead) or getattr(head, "weight", None) is getattr(table, "weight", table)
    total = sum(sizes.values())
    return Contender(name, model, dtype, total, total - (0 if shared else sizes[table]))


def _own_bytes(module: nn.Module, dtype: torch.dtype, seen: set[int]) -> int:
    """Bytes of a module's own tensors in the form that runs, those in `seen` left out; they are added to it."""
    if isinstance(module, CompressedWeight) and module.form is not None and not module.scheme.prompt_static:
        return module.shape[0] * module.shape[1] * dtype.itemsize
    total = 0
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept_as = _kept_as(module, name, tensor)
            total += tensor.numel() * kept_as.itemsize
    return total


def _kept_as(module: nn.Module, name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor while it runs: the CPU's 2:4 layout keeps fp32 values that are bf16 numbers as bf16."""
    narrows = isinstance(module, CompressedWeight) and module.op == "two_four" and name == "values"
    if narrows and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
        return torch.bfloat16 if bool((tensor.bfloat16() == tensor).all()) else torch.float32
    return tensor.dtype


def linear_calls(model: Any, names: list[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """How to run the linears `names` of `model` and a compressed table's logits, by name, in the model's order.

    Raises InputError when the model lacks one, which makes it another model's dense checkpoint.
    """
    wanted = set(names)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, module in model.named_modules():
        if name not in wanted:
            continue
        if isinstance(module, CompressedEmbedding):
            calls[name] = module.logits
        elif isinstance(module, nn.Embedding):
            calls[name] = _product(module.weight)
        else:
            calls[name] = module
    if missing := [name for name in names if name not in calls]:
        raise InputError(
            f"--dense: has no {missing[0]}, which the artifact compressed; name the model it was made from"
        )
    return calls


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, weight)


def _to_int4(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Replace the linear `name` by dense int4 unless it is that already; returns whether it was replaced."""
    module = model.get_submodule(name)
    if isinstance(module, CompressedLinear):
        scheme = module.scheme
        if scheme.storage == "integers" and scheme.low_rank is None and exact_int4(scheme) is not None:
            return False
        target = exact_int4(scheme)
        weight = None if target is not None else module.effective_weight()
    else:
        target, weight = None, module.weight.detach()
    if target is None:
        target = IntegerScheme(bits=4, group_size=min(INT4_GROUP, module.in_features // 2 * 2), symmetric=True)
    replacement = CompressedLinear(
        target.dense, module.in_features, module.out_features, module.bias is not None, device="meta", dtype=dtype
    )
    tensors = (
        as_int4(scheme, module.stored(), module.shape) if weight is None else rounded_int4(weight, target.group_size)
    )
    for key in storage.weight_specs(target.dense, replacement.shape):
        setattr(replacement, key, tensors[key])
    if module.bias is not None:
        replacement.bias = module.bias.detach()
    model.set_submodule(name, replacement.eval())
    return True
