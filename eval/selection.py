"""Scoring models whose linears select their inputs: which tokens do, and what share of the weights' bytes they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from ..serving.core_inputs import CoreInputs
from ..serving.errors import InputError
from ..serving.linear import CompressedLinear
from ..serving.scheme import ArtifactConfig
from ..serving.storage import selection_of, tensor_specs
from ..triton_kernels.input_select import reference

SPARSE_TOKENS = 0.99  # of a window's tokens select their inputs when it is scored: all but the first 1 %


def dense_tokens_of(seqlen: int, sparse_tokens: float = SPARSE_TOKENS) -> int:
    """How many tokens at the start of a window of `seqlen` read every input."""
    return seqlen - round(sparse_tokens * seqlen)


def prompt_tokens_of(seqlen: int) -> int:
    """How many tokens at the start of a window of `seqlen` are its prompt, where a prompt chooses the inputs."""
    return max(1, seqlen // 4)


def require_scored_apart(artifact: ArtifactConfig | None, where: str | Path) -> None:
    """Raise InputError when a prompt chooses the artifact's inputs: those who call this do not know prompts."""
    if artifact is not None and artifact.prompt_static:
        raise InputError(
            f"{where}: threshold: prompt lets a prompt choose the inputs, which tasks and comparisons do not tell from"
            " what follows; score it with `halfweight eval`, and other models with the same --prompt-tokens"
        )


def inputs_read(stats: Mapping[str, Mapping[str, float | None]]) -> str | None:
    """In words, what the linears of a report read on the dev set beside what they were to, from the `stats` of each by
    name; None where none was to read a share. Thresholds are of the calibration text, so other text reads otherwise."""
    shares = {}
    for name, found in stats.items():
        read, wanted = found.get("inputs_read"), found.get("inputs_wanted")
        if read is not None and wanted is not None:
            shares[name] = (read, wanted)
    if not shares:
        return None
    read, wanted = (sum(column) / len(shares) for column in zip(*shares.values(), strict=True))
    worst = max(shares, key=lambda name: abs(shares[name][0] - shares[name][1]))
    return (
        f"{read:.1%} on held-out text, aimed at {wanted:.1%}; farthest off {worst}: {shares[worst][0]:.1%} for"
        f" {shares[worst][1]:.1%}"
    )


class Reading:
    """What single tokens read of a model's selecting linears; grows as the model runs inside `selecting_tokens`."""

    def __init__(self) -> None:
        # Bytes read, bytes of the weights, and weights, of every window and linear.
        self.sums: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, module: CompressedLinear, inputs: float) -> None:
        """Count a window whose tokens read the share `inputs` of a linear's inputs on average."""
        read, whole, weights = self.sums
        read += inputs * _weight_bytes(module) + _bytes_beside(module)
        self.sums = (read, whole + _weight_bytes(module), weights + prod(module.shape))

    @property
    def fraction(self) -> float | None:
        """Bytes read of the selecting linears, with thresholds, norms and branches, over the bytes of their weights
        alone, at one token at a time; None before a token was seen."""
        read, whole, _ = self.sums
        return read / whole if whole else None

    @property
    def bits(self) -> float | None:
        """Bits read of the selecting linears, with what `fraction` counts, for every weight they have; None before a
        token was seen."""
        read, _, weights = self.sums
        return 8 * read / weights if weights else None


@contextmanager
def selecting_tokens(model: nn.Module, dense_tokens: int) -> Iterator[Reading]:
    """Within the `with`, the first `dense_tokens` of every sequence read all inputs; the others select and count.

    Sequences are `[..., T, K]` inputs of the linears. It does not matter what the checkpoint says about prefill. Where
    a prompt chooses the inputs, it is the first `dense_tokens`; raises InputError when there are none.
    """
    reading = Reading()
    modules = [m for m in model.modules() if isinstance(m, CompressedLinear) and m.scheme.selection is not None]
    handles = [module.register_forward_pre_hook(_counter(module, dense_tokens, reading)) for module in modules]
    prefill = [module.dense_prefill for module in modules]
    cores = [module.form for module in modules if isinstance(module.form, CoreInputs)]
    if cores and not dense_tokens:
        raise InputError("threshold: prompt needs a prompt of one token or more")
    for core in cores:
        core.prompt_tokens = dense_tokens
    for module in modules:
        module.dense_tokens, module.dense_prefill = dense_tokens, False
    try:
        yield reading
    finally:
        for module, handle, dense in zip(modules, handles, prefill, strict=True):
            module.dense_tokens, module.dense_prefill = 0, dense
            handle.remove()
        for core in cores:
            core.prompt_tokens = None
            core.forget()


def _counter(module: CompressedLinear, dense_tokens: int, reading: Reading) -> Callable[..., None]:
    selection = selection_of(module.scheme, module.stored())
    assert selection is not None  # the caller has looked

    def count(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0][..., dense_tokens:, :]
        if module.scheme.prompt_static and selection.counts is not None:
            if x.numel():
                reading.add(module, float(selection.counts[0]) / x.shape[-1])
            return
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
