"""The input embedding as integer rows, and a head tied to it: one module, one set of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..triton_kernels.formats import FormatError
from .errors import InputError
from .linear import CompressedWeight
from .scheme import IntegerScheme, LinearScheme


class CompressedEmbedding(CompressedWeight):
    """Rows of a table `[vocabulary, hidden]` stored as `scheme` says, times `factor` (Gemma's sqrt(hidden)).

    A tied head computes its logits with the same tensors, without the factor.
    """

    _like: Tensor

    def __init__(
        self,
        scheme: LinearScheme,
        num_embeddings: int,
        embedding_dim: int,
        factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises FormatError when a table of this shape cannot be stored so."""
        super().__init__(scheme, (num_embeddings, embedding_dim), device, dtype)
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor
        # Integers do not follow the model's dtype, so this does.
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[..., hidden]` of token ids `[...]` in the model's dtype."""
        prepared = self._prepared or self.prepare(self._like.dtype)
        assert prepared.rows is not None  # whatever runs a table finds its rows
        return self.scaled(prepared.rows(ids, self._like.dtype))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of the table as the model takes them: times the factor, rounded to their dtype first as Gemma does."""
        return rows if self.factor == 1.0 else rows * float(torch.tensor(self.factor, dtype=rows.dtype))

    def logits(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., hidden]` -> `[..., vocabulary]`."""
        return self.multiply(x, bias)

    @property
    def op(self) -> str:
        return "tied"


class TiedHead(nn.Module):
    """The head of a model whose embedding is `embedding`; it has no tensors but a bias `[vocabulary]`, if at all."""

    bias: nn.Parameter | None

    def __init__(self, embedding: CompressedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = embedding.shape
        self._embedding = (embedding,)  # in a tuple, or its tensors would be listed twice
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., hidden]` -> `[..., vocabulary]`."""
        return self._embedding[0].logits(x, self.bias)


def swap_embedding(model: Any, integers: IntegerScheme) -> None:
    """Replace, in place, the model's input embedding by its compressed module, and a head tied to it by `TiedHead`.

    The new buffers lie on the old table's device. Raises InputError when the model's embedding is not a table.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    where, tied = f"{names.get(table, 'the embedding')}.weight", getattr(model, "all_tied_weights_keys", None) or {}
    try:
        if not isinstance(table, nn.Embedding):
            raise FormatError(f"is a {type(table).__name__}")
        (rows, columns), device, dtype = table.weight.shape, table.weight.device, table.weight.dtype
        module = CompressedEmbedding(integers.dense, rows, columns, _factor(table), device, dtype)
    except FormatError as error:
        raise InputError(f"{where.removesuffix('.weight')}: {error}; it cannot be quantized") from None
    module.train(table.training)
    model.set_submodule(names[table], module)
    followers = {name for name, source in tied.items() if source == where}
    if not followers:
        return
    if not isinstance(head, nn.Linear) or followers != {f"{names[head]}.weight"}:
        raise InputError(f"{where}: is tied to {', '.join(sorted(followers))}; only a linear head may be")
    model.set_submodule(names[head], TiedHead(module, head.bias).train(head.training))
    # transformers ties parameters by these two: those that it knows at load, and those it finds again on request.
    model.all_tied_weights_keys = {name: source for name, source in tied.items() if name not in followers}
    keys = model._tied_weights_keys or {}
    model._tied_weights_keys = {name: source for name, source in keys.items() if name not in followers}


def _factor(table: nn.Embedding) -> float:
    """What the table multiplies its rows by; raises FormatError for one that does something else to them."""
    if type(table) is nn.Embedding:
        return 1.0
    factor = getattr(table, "scalar_embed_scale", None)
    if not isinstance(factor, float):
        raise FormatError(f"is a {type(table).__name__}")
    return factor
