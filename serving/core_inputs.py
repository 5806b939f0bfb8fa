"""Core inputs (`threshold: prompt`): a prompt chooses once which inputs a linear reads of every token after it.

CoreInfer (Wang et al. 2024, arXiv 2410.18311) does so to the neurons of an FFN. The tokens of a prompt read everything
and vote: each for as many inputs as the linear stores in `counts`, those with its largest scores. The inputs with the
most votes (then the largest sum of scores, then the lowest index) are the core. With the first token after the prompt
their rows of the weight are gathered into a contiguous copy, and decoding multiplies by that: nothing is compared or
gathered token by token. Inputs outside the core pass through the low-rank branch, if there is one.

What was counted belongs to the sequences that the model has in its KV cache: `follow_prompts` puts a hook on the model
that starts anew with every forward pass whose cache is empty. Several tokens behind a cache that is not empty (a prompt
in chunks, the next turn of a chat) are counted too, and the core is chosen again; a single one is decoding. The
sequences of a batch share one core, from the tokens of all their prompts; padding does not vote where the model gets a
mask `[B, tokens]`. One model therefore runs one batch of sequences at a time; the hook refuses another's KV cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..triton_kernels import dispatch
from ..triton_kernels.formats.input_select import InputSelection
from ..triton_kernels.input_select import reference as select_reference
from ..triton_kernels.weight import Prepared, Weight
from .errors import RunError
from .scheme import LinearScheme
from .storage import settings_of

Multiply = Callable[[Tensor, Tensor | None], Tensor]

_ROWS = 1024  # tokens whose scores are compared together

BACKEND = "torch"  # what `explain` says runs such linears


class CoreInputs:
    """The form of one linear `[N, K]` (see `linear.Form`), and what the prompt has said of its inputs.

    `decoding`: whether the next tokens follow the prompt, and `padding`, bool `[B * T]`, those that are padding; the
    model's hook sets both. With `prompt_tokens`, for scoring, every `[..., T, K]` is a sequence of its own that begins
    with a prompt of so many tokens. `core`, int64 `[count]`, rising, are the inputs in use, once there are any;
    `given`, of the same form, are read in place of the prompt's choice.
    """

    def __init__(self) -> None:
        self.decoding = False
        self.padding: Tensor | None = None
        self.prompt_tokens: int | None = None
        self.given: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Begin a new prompt."""
        self._votes: Tensor | None = None
        self._sums: Tensor | None = None
        self._release()

    def count(self, x: Tensor, selection: InputSelection, inputs: int) -> None:
        """Let the tokens `x` `[..., K]` of a prompt vote for `inputs` each; what was chosen before is chosen anew."""
        x = x.detach().reshape(-1, x.shape[-1])
        if self.padding is not None and len(self.padding) == len(x):
            x = x[~self.padding.to(x.device)]
        if self._votes is None or self._sums is None:
            self._votes = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
            self._sums = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for rows in x.split(_ROWS):
            score = select_reference.scores(rows, selection, 0)
            # Not in place: the tensors may be those of an earlier turn in inference mode.
            self._votes = self._votes + (~(score <= select_reference.token_cuts(score, inputs))).sum(0)
            self._sums = self._sums + score.sum(0, dtype=torch.float64)
        self._release()

    def _release(self) -> None:
        """Choose and gather again when the core is next needed."""
        self.core: Tensor | None = None
        self._multiply: Multiply | None = None

    def _chosen(self, count: int) -> Tensor:
        """The core of what has been counted."""
        if self.given is not None:
            return self.given
        assert self._votes is not None and self._sums is not None
        order = self._sums.argsort(descending=True, stable=True)
        order = order[self._votes[order].argsort(descending=True, stable=True)]
        return order[:count].sort().values

    def __call__(self, module: Any, dtype: torch.dtype) -> Prepared:
        """All inputs for a prompt, in plain torch; the core for what follows."""
        tensors, weight, backend = module.stored(), module._weight(), module.backend
        selection = weight.selection
        count = 1 if weight.device.type == "meta" else int(selection.counts[0])  # as in the reference
        self._release()
        everything = partial(weight.linear, masked=False)

        def core(x: Tensor, bias: Tensor | None) -> Tensor:
            if self.core is None or self._multiply is None:
                self.core = self._chosen(count).to(x.device)
                self._multiply = _gather(weight, self.core, dtype, backend)
            y = self._multiply(x.index_select(-1, self.core), None)
            if selection.V is not None and selection.U is not None:
                rest = x.index_fill(-1, self.core, 0) @ selection.V[0].to(x.dtype)
                y = y + rest @ selection.U.to(x.dtype).T
            return y if bias is None else y + bias.to(x.dtype)

        def sequence(x: Tensor, bias: Tensor | None) -> Tensor:
            prompt, after = x[..., : self.prompt_tokens, :], x[..., self.prompt_tokens :, :]
            self.forget()
            self.count(prompt, selection, count)
            return torch.cat((everything(prompt, bias), core(after, bias)), dim=-2)

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            if x.is_meta:
                return everything(x, bias)
            if self.prompt_tokens is not None:
                return sequence(x, bias)
            if self.decoding and self._votes is not None:
                return core(x, bias)
            self.count(x, selection, count)
            return everything(x, bias)

        return Prepared(BACKEND, reason_of(module.scheme, module.shape, dtype, weight.device), run, lambda: tensors)

    def verify(self, module: Any, dtype: torch.dtype, tokens: int, seed: int) -> tuple[bool, str]:
        """Check the kernels that multiply by gathered codes; for 16-bit weights there are none."""
        weight = module._weight()
        if weight.op == "input_select":
            return True, reason_of(module.scheme, module.shape, dtype, weight.device)
        first = torch.arange(int(weight.selection.counts[0]), device=weight.device)
        return dispatch.verify(_rows(weight, first), dtype, tokens, seed)


def reason_of(scheme: LinearScheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str:
    """What multiplies a linear `[N, K]` by its core, in words."""
    if scheme.op == "input_select":
        return "the prompt's inputs, by plain matmuls"
    backend, reason = dispatch.expect(scheme.op, shape, dtype, device, {**settings_of(scheme), "selects": False})
    return f"the prompt's inputs, in decoding by {backend}: {reason}"


def follow_prompts(model: nn.Module, cores: Sequence[CoreInputs]) -> None:
    """Let forward passes of the transformers `model` tell the forms of its linears where prompts begin and end."""
    if cores:
        model.register_forward_pre_hook(_Watch(cores), with_kwargs=True)


class _Watch:
    """The hook; an object, not a function, so that a copy of the model gets one for its own linears. Raises RunError
    when sequences take turns."""

    def __init__(self, cores: Sequence[CoreInputs]) -> None:
        self._cores = cores
        self._cache: int | None = None  # that of the last forward pass, where it was given

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs if args else kwargs
        ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        tokens = (given["inputs_embeds"] if ids is None else ids).shape[1]
        before = 0 if cache is None else int(cache.get_seq_length())
        if before and self._cache not in (None, id(cache)):
            raise RunError(
                "this KV cache is not that of the last forward pass, whose prompt chose the inputs that are read; with"
                " threshold: prompt, finish one batch of sequences before the next, or load the model once for each"
            )
        self._cache = None if cache is None else id(cache)
        padding = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == before + tokens:
            padding = (mask[:, -tokens:] == 0).flatten()
        for core in self._cores:
            if core.prompt_tokens is not None:
                continue  # its windows say themselves where their prompts end
            if not before:
                core.forget()
            core.decoding, core.padding = before > 0 and tokens == 1, padding


def _gather(weight: Weight, chosen: Tensor, dtype: torch.dtype, backend: str) -> Multiply:
    """What multiplies by a contiguous copy of the rows `chosen` of W^T: a matmul, or for codes the op's own kernels."""
    rows = _rows(weight, chosen)
    if weight.op != "input_select":
        return dispatch.reference(rows, "") if backend == "reference" else dispatch.prepare(rows, dtype)
    return partial(_matmul, rows.tensors["weight_t"])


def _matmul(rows: Tensor, x: Tensor, _: Tensor | None) -> Tensor:
    return x @ rows.to(x.dtype)


def _rows(weight: Weight, chosen: Tensor) -> Weight:
    """The linear of the inputs `chosen`, which reads all of them."""
    tensors = {k: t.index_select(0, chosen) for k, t in weight.tensors.items() if k not in InputSelection._fields}
    shape = (weight.shape[0], len(chosen))
    return replace(weight, tensors=tensors, shape=shape, settings={**weight.settings, "selects": False})
