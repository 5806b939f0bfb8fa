"""Compressed linears as plain modules with plain buffers, and the one place that swaps them into a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..triton_kernels import dispatch
from ..triton_kernels.formats import FormatError
from ..triton_kernels.formats.input_select import InputSelection
from ..triton_kernels.input_select import reference as select_reference
from ..triton_kernels.weight import Prepared, Weight
from . import storage
from .core_inputs import CoreInputs
from .errors import InputError
from .scheme import LinearScheme

Run = Callable[[Tensor, Tensor | None], Tensor]
Backend = Literal["auto", "triton", "cpu", "reference"]

# Held while a module's weights change their form, which is rare; a lock per module could not be copied with it.
# A form made of a linear and its branch asks for the branch's weights meanwhile.
_CHANGING = threading.RLock()


class Form(Protocol):
    """What a module becomes instead of dispatch's choice: called in `prepare`, and checked in `verify` as that says."""

    def __call__(self, module: Any, dtype: torch.dtype) -> Prepared: ...

    def verify(self, module: Any, dtype: torch.dtype, tokens: int, seed: int) -> tuple[bool, str]: ...


class CompressedWeight(nn.Module):
    """A weight `[N, K]` stored as `scheme` says; subclasses compute with it.

    The stored tensors are buffers under the format's own names. The first forward pass (or `prepare`) turns them into
    the layout of the fastest implementation for this device; whatever needs the stored form again (`state_dict`, `.to`,
    a copy) turns them back, so that only one form is in memory at a time.
    """

    def __init__(
        self,
        scheme: LinearScheme,
        shape: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises FormatError when a weight of this shape cannot be stored so."""
        super().__init__()
        self.scheme, self.shape = scheme, shape
        dtype = dtype or torch.get_default_dtype()
        for name, spec in storage.weight_specs(scheme, shape).items():
            self.register_buffer(name, torch.zeros(spec.shape, device=device, dtype=spec.dtype or dtype))
        self._prepared: Prepared | None = None
        self.backend: Backend = "auto"
        self.form: Form | None = None  # what a speed verdict asks for, see verdicts.py

    @property
    def op(self) -> str:
        """The folder of kernels in triton_kernels that runs this module."""
        return self.scheme.op

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name, without the bias; brings them back when they are prepared."""
        self._restore()
        return {name: getattr(self, name) for name in storage.weight_specs(self.scheme, self.shape)}

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with its zeros."""
        return storage.dense_weight(self.scheme, self.stored(), self.shape, dtype)

    def check(self) -> None:
        """Raise FormatError when the loaded buffers are not a valid weight of this module's shape."""
        storage.validate(self.scheme, self.stored(), self.shape)

    def prepare(self, dtype: torch.dtype) -> Prepared:
        """Choose the implementation for inputs of `dtype` on this module's device, and take on its layout."""
        with _CHANGING:
            if self._prepared is None:
                weight = self._weight()
                if self.form is not None:
                    self._prepared = self.form(self, dtype)
                elif self.backend == "reference":
                    self._prepared = dispatch.reference(weight, "backend='reference' was asked for")
                else:
                    self._prepared = dispatch.prepare(weight, dtype)
                if self._prepared.backend != "reference":
                    for name in weight.tensors:
                        setattr(self, name, None)
            return self._prepared

    def verify(self, dtype: torch.dtype, tokens: int, seed: int = 0) -> tuple[bool, str]:
        """Compare the implementation for `dtype` with the reference on random inputs; see `dispatch.verify`."""
        self._restore()
        if self.form is not None:
            return self.form.verify(self, dtype, tokens, seed)
        return dispatch.verify(self._weight(), dtype, tokens, seed)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`. Gradients reach `x`, for adapters in earlier layers; the weight is frozen."""
        prepared = self._prepared or self.prepare(x.dtype)
        if prepared.backend in ("dense", "torch") or not (x.requires_grad and torch.is_grad_enabled()):
            return prepared(x, bias)
        if self.scheme.selection is not None:  # what is not read has no gradient either
            weight = storage.weight_of(self.scheme, prepared.restore(), self.shape, x.dtype)
            return weight.linear(x, bias)
        y: Tensor = _Multiply.apply(x, self)
        return y if bias is None else y + bias

    def _weight(self) -> Weight:
        tensors = {name: getattr(self, name) for name in storage.weight_specs(self.scheme, self.shape)}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        floating = (tensor.dtype for tensor in present.values() if tensor.is_floating_point())
        weight = storage.weight_of(self.scheme, present, self.shape, next(floating, torch.float32))
        return replace(weight, op=self.op)

    def _restore(self) -> None:
        """Bring the stored tensors back, bit for bit."""
        with _CHANGING:
            if self._prepared is not None:
                for name, tensor in self._prepared.restore().items():
                    setattr(self, name, tensor)
                self._prepared = None

    def implementation(self) -> Prepared | None:
        """What runs this module, or None before it was decided."""
        return self._prepared

    def forget(self) -> None:
        """Drop the weights: the stored tensors are back on the meta device, to be loaded anew."""
        with _CHANGING:
            self._prepared = None
            for name, spec in storage.weight_specs(self.scheme, self.shape).items():
                setattr(self, name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CompressedWeight:
        self._restore()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._restore()
        return self.__dict__.copy()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        n, k = self.shape
        return f"in_features={k}, out_features={n}, pattern={self.scheme.pattern}, numbers={self.scheme.numbers}"


class CompressedLinear(CompressedWeight):
    """`y = x @ W.T + bias` with `W` `[out_features, in_features]` stored as `scheme` says, and `bias` `[N]` or None.

    A low-rank branch adds `(x @ V) @ U.T`: buffers `V` `[1, K, rank]` and `U` `[N, rank]`, or two linears of integers.
    With a selection, `y = select(x) @ W.T + (x - select(x)) @ V @ U.T + bias`; see `formats.input_select`. The first
    `dense_tokens` of a sequence `[..., T, K]` read every input then, and with `dense_prefill` all do unless T is 1.
    Where a prompt chooses the inputs, `core_inputs.py` says which tokens read them.
    """

    bias: Tensor | None
    V: Tensor | CompressedLinear
    U: Tensor | CompressedLinear

    def __init__(
        self,
        scheme: LinearScheme,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises FormatError when a linear of this shape cannot be stored so."""
        super().__init__(scheme, (out_features, in_features), device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.dense_tokens, self.dense_prefill = 0, False
        if scheme.prompt_static:
            self.form = CoreInputs()
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
        branch = scheme.added_branch
        if branch is None:
            return
        specs = storage.tensor_specs(scheme, self.shape)
        if branch.parts is None:
            for name in ("V", "U"):
                self.register_buffer(name, torch.zeros(specs[name].shape, device=device, dtype=dtype))
        else:
            inner, outer = branch.parts
            self.V = CompressedLinear(inner, in_features, branch.rank, False, device, dtype)
            self.U = CompressedLinear(outer, branch.rank, out_features, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`; the result of a row of `x` depends on that row alone."""
        prepared = self._prepared or self.prepare(x.dtype)
        if prepared.run_all is not None and (self.dense_tokens or self.dense_prefill) and x.ndim > 1:
            return self._partly_dense(x, prepared.run_all, prepared.run)
        y = self.multiply(x, self.bias)
        # A dense form has the branch's share in its weight.
        whole = self.scheme.added_branch is None or prepared.backend == "dense"
        return y if whole else y + self._branch(x)

    def _partly_dense(self, x: Tensor, run_all: Run, run: Run) -> Tensor:
        tokens = x.shape[-2]
        first = tokens if self.dense_prefill and tokens > 1 else min(self.dense_tokens, tokens)
        if first == tokens:
            return run_all(x, self.bias)
        rest = run(x[..., first:, :], self.bias)
        return torch.cat((run_all(x[..., :first, :], self.bias), rest), dim=-2) if first else rest

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with its zeros, plus the share of a low-rank branch that all inputs pass through."""
        tensors = self.stored()
        for name in () if self.scheme.added_branch is None else ("V", "U"):
            part = getattr(self, name)
            tensors |= (
                {name: part} if isinstance(part, Tensor) else {f"{name}.{k}": t for k, t in part.stored().items()}
            )
        return storage.effective_weight(self.scheme, tensors, self.shape, dtype)

    def _branch(self, x: Tensor) -> Tensor:
        v, u = self.V, self.U
        if isinstance(v, Tensor) and isinstance(u, Tensor):
            return nn.functional.linear(x @ v[0].to(x.dtype), u.to(x.dtype))
        assert not isinstance(v, Tensor) and not isinstance(u, Tensor)  # both or neither are integers
        return u.multiply(v.multiply(x, None), None)  # their calls would cost as much as their kernels on small models


class SelectingLinear(nn.Linear):
    """A dense linear; once it has a `selection` of one part, every token reads the inputs that it selects, but for the
    first `dense_tokens` of a sequence `[..., T, K]`, which read all."""

    selection: InputSelection | None = None
    dense_tokens = 0

    @classmethod
    def like(cls, linear: nn.Linear) -> SelectingLinear:
        """`linear` with the same parameters, as one that may get a selection."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`."""
        if self.selection is None:
            return super().forward(x)
        first = self.dense_tokens if x.ndim > 1 else 0
        y = select_reference.linear(x[..., first:, :], self.weight.T, self.selection, self.bias)
        return torch.cat([super().forward(x[..., :first, :]), y], dim=-2) if first else y


def read_all_in_prefill(model: nn.Module, dense: bool = True) -> None:
    """Whether the linears of `model` that select their inputs read all of them where a sequence has several tokens."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.dense_prefill = dense


def read_all_at_first(model: nn.Module, tokens: int) -> None:
    """Let the first `tokens` of a sequence read all inputs of the linears of `model` that select theirs by token."""
    for module in model.modules():
        if isinstance(module, CompressedLinear) and module.scheme.selection is not None:
            module.dense_tokens = 0 if module.scheme.prompt_static else tokens


def core_inputs(model: nn.Module) -> list[CoreInputs]:
    """The forms of the linears of `model` whose inputs a prompt chooses."""
    linears = (module for module in model.modules() if isinstance(module, CompressedLinear))
    return [linear.form for linear in linears if isinstance(linear.form, CoreInputs)]


class _Multiply(torch.autograd.Function):
    """`x @ W.T` by whatever runs the module; W is expanded again for the gradient, instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: CompressedWeight) -> Tensor:
        ctx.module = module
        return module.prepare(x.dtype)(x, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        module = ctx.module
        tensors = module.prepare(grad.dtype).restore()
        return grad @ storage.dense_weight(module.scheme, tensors, module.shape, grad.dtype), None


def swap_linears(model: nn.Module, linears: Mapping[str, LinearScheme]) -> None:
    """Replace, in place, each named `nn.Linear` whose scheme has a packed storage by its compressed module.

    The new buffers lie on the old weight's device (meta, when the model is a skeleton). Raises InputError when a name
    is not a linear of the model or its shape does not allow the scheme.
    """
    for name, scheme in linears.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"quantization_config names {name}, which the model does not have") from None
        if not isinstance(linear, nn.Linear):
            raise InputError(f"quantization_config names {name}, which is a {type(linear).__name__}, not a linear")
        if scheme.storage == "dense":
            continue
        weight, bias = linear.weight, linear.bias is not None
        try:
            module = CompressedLinear(
                scheme, linear.in_features, linear.out_features, bias, weight.device, weight.dtype
            )
        except FormatError as error:
            raise InputError(f"{name}: {error}") from None
        module.train(linear.training)
        model.set_submodule(name, module)


def expand_linears(block: nn.Module, dtype: torch.dtype) -> None:
    """Replace, in place, each compressed linear inside `block` by a dense one with its effective weight in `dtype`.

    What a linear reads by, and which tokens do, stays as it is.
    """
    found = {name: module for name, module in block.named_modules() if isinstance(module, CompressedLinear)}
    for name, module in found.items():
        if name.rpartition(".")[0] in found:
            continue  # half of a branch
        dense = SelectingLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        dense.selection, dense.dense_tokens = storage.selection_of(module.scheme, module.stored()), module.dense_tokens
        dense.weight = nn.Parameter(module.effective_weight(dtype), requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias, requires_grad=False)
        block.set_submodule(name, dense)


def check_weights(model: nn.Module, where: str) -> None:
    """Validate every compressed module's loaded buffers; raises InputError naming `where` and the module."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedWeight):
            try:
                module.check()
            except FormatError as error:
                raise InputError(f"{where}: {name}: {error}; the file is damaged or hostile") from None
