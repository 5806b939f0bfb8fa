"""Compressed linears as plain modules with plain buffers, and the one place that swaps them into a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..triton_kernels import dispatch
from ..triton_kernels.formats import FormatError
from ..triton_kernels.weight import Prepared, Weight
from . import storage
from .errors import InputError
from .scheme import LinearScheme

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
                self._prepared = dispatch.prepare(weight, dtype) if self.form is None else self.form(self, dtype)
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
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
        branch = scheme.low_rank
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
        y = prepared(x, self.bias)
        # A dense form has the branch's share in its weight.
        return y if self.scheme.low_rank is None or prepared.backend == "dense" else y + self._branch(x)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with its zeros, plus the low-rank branch's share of it."""
        tensors = self.stored()
        for name in () if self.scheme.low_rank is None else ("V", "U"):
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
        result: Tensor = u(v(x))
        return result


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
    """Replace, in place, each compressed linear inside `block` by a dense one with its effective weight in `dtype`."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, CompressedLinear)}
    for name, module in found.items():
        if name.rpartition(".")[0] in found:
            continue  # half of a branch
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
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
