"""Compressed linears as plain modules with plain buffers, and the one place that swaps them into a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..triton_kernels.formats import FormatError, two_four
from .errors import InputError
from .scheme import LinearScheme


class TwoFourLinear(nn.Module):
    """`y = x @ W.T + bias` with a 2:4 sparse `W` `[out_features, in_features]`.

    Buffers: `values` `[N, K/2]` in the model's dtype and `meta` `[N, ceil(K/8)]` uint8 (layout:
    `triton_kernels/formats/two_four.py`), `bias` `[N]` or None. The forward pass expands W and calls the dense
    matmul: the reference that every faster kernel has to reproduce.
    """

    values: Tensor
    meta: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shapes = two_four.packed_shapes((out_features, in_features))
        self.register_buffer("values", torch.zeros(shapes["values"], device=device, dtype=dtype))
        self.register_buffer("meta", torch.zeros(shapes["meta"], device=device, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def dense_weight(self) -> Tensor:
        """The weight `[N, K]` with its zeros, in the dtype of `values`."""
        return two_four.unpack(self.values, self.meta)

    def check(self) -> None:
        """Raise FormatError when the loaded buffers are not a valid 2:4 weight of this module's shape."""
        two_four.validate(self.values, self.meta, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`; the result of a row of `x` depends on that row alone."""
        return F.linear(x, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, pattern=2:4"


def pack_weight(weight: Tensor, scheme: LinearScheme) -> dict[str, Tensor]:
    """Tensors to store for a compressed dense `weight` `[N, K]`, by suffix; raises FormatError off the pattern."""
    if scheme.storage == "two_four":
        values, meta = two_four.pack(weight)
        return {"values": values, "meta": meta}
    return {"weight": weight}


def unpack_weight(tensors: Mapping[str, Tensor], scheme: LinearScheme) -> Tensor:
    """Inverse of `pack_weight`: the dense weight `[N, K]` in its stored dtype."""
    if scheme.storage == "two_four":
        return two_four.unpack(tensors["values"], tensors["meta"])
    return tensors["weight"]


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
        weight = linear.weight
        try:
            module = TwoFourLinear(
                linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype
            )
        except FormatError as error:
            raise InputError(f"{name}: {error}") from None
        module.train(linear.training)
        model.set_submodule(name, module)


def check_linears(model: nn.Module, where: str) -> None:
    """Validate every compressed module's loaded buffers; raises InputError naming `where` and the module."""
    for name, module in model.named_modules():
        if isinstance(module, TwoFourLinear):
            try:
                module.check()
            except FormatError as error:
                raise InputError(f"{where}: {name}: {error}; the file is damaged or hostile") from None
