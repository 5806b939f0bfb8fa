"""Scoring models whose linears select their inputs: which tokens do, and what share of the weights' bytes they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import nn

from ..serving.linear import CompressedLinear
from ..serving.storage import selection_of, tensor_specs
from ..triton_kernels.input_select import reference

SPARSE_TOKENS = 0.99  # of a window's tokens select their inputs when it is scored: all but the first 1 %


def dense_tokens_of(seqlen: int, sparse_tokens: float = SPARSE_TOKENS) -> int:
    """How many tokens at the start of a window of `seqlen` read every input."""
    return seqlen - round(sparse_tokens * seqlen)


class Reading:
    """What single tokens read of a model's selecting linears; grows as the model runs inside `selecting_tokens`."""

    def __init__(self) -> None:
        self._read = self._whole = 0.0

    def add(self, module: CompressedLinear, inputs: float) -> None:
        """Count a window whose tokens read the share `inputs` of a linear's inputs on average."""
        self._read += inputs * _weight_bytes(module) + _bytes_beside(module)
        self._whole += _weight_bytes(module)

    @property
    def fraction(self) -> float | None:
        """Bytes read of the selecting linears, with thresholds, norms and branches, over the bytes of their weights
        alone, at one token at a time; None before a token was seen."""
        return self._read / self._whole if self._whole else None


@contextmanager
def selecting_tokens(model: nn.Module, dense_tokens: int) -> Iterator[Reading]:
    """Within the `with`, the first `dense_tokens` of every sequence read all inputs; the others select and count.

    Sequences are `[..., T, K]` inputs of the linears. It does not matter what the checkpoint says about prefill.
    """
    reading = Reading()
    modules = [m for m in model.modules() if isinstance(m, CompressedLinear) and m.scheme.selection is not None]
    handles = [module.register_forward_pre_hook(_counter(module, dense_tokens, reading)) for module in modules]
    prefill = [module.dense_prefill for module in modules]
    for module in modules:
        module.dense_tokens, module.dense_prefill = dense_tokens, False
    try:
        yield reading
    finally:
        for module, handle, dense in zip(modules, handles, prefill, strict=True):
            module.dense_tokens, module.dense_prefill = 0, dense
            handle.remove()


def _counter(module: CompressedLinear, dense_tokens: int, reading: Reading) -> Callable[..., None]:
    selection = selection_of(module.scheme, module.stored())
    assert selection is not None  # the caller has looked

    def count(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0][..., dense_tokens:, :]
        used = reference.selected(x.reshape(-1, x.shape[-1]), selection, 0)
        if len(used):
            reading.add(module, float(used.float().mean()))

    return count


def _weight_bytes(module: CompressedLinear) -> float:
    return _bytes(module) - _bytes_beside(module)


def _bytes_beside(module: CompressedLinear) -> float:
    """Of threshold or count, norms and branch."""
    return _bytes(module, "thresholds", "counts", "norms", "V", "U")


def _bytes(module: CompressedLinear, *names: str) -> float:
    specs = tensor_specs(module.scheme, module.shape)
    chosen = [spec for name, spec in specs.items() if not names or name in names]
    return float(sum(prod(spec.shape) * (spec.dtype.itemsize if spec.dtype is not None else 2) for spec in chosen))
