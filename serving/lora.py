"""LoRA adapters of the `peft` package on compressed linears: they train, the compressed weights stay as they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .linear import CompressedLinear


def lora_config(**settings: Any) -> Any:
    """A `peft.LoraConfig(**settings)` whose targets may be compressed linears, for `peft.get_peft_model`.

    Adapters beside compressed linears cannot be merged, and DoRA, which needs their dense weight, is refused. Raises
    InputError when peft is missing.
    """
    adapter = _adapter()
    from peft import LoraConfig

    config = LoraConfig(**settings)
    config._register_custom_module({CompressedLinear: adapter})
    return config


@cache
def _adapter() -> type:
    """The adapter class; peft is optional and slow to import, so it exists once it is asked for."""
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError:
        raise InputError("LoRA needs the peft package: pip install peft") from None

    class CompressedLoraLinear(torch.nn.Module, LoraLayer):
        """A compressed linear with one or more adapters."""

        def __init__(
            self, base_layer: Any, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **_: Any
        ) -> None:
            if config.use_dora:
                raise InputError("DoRA needs dense weights, which compressed linears do not have; use plain LoRA")
            torch.nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config)
            # peft moves the adapters to where this tensor lies.
            base_layer.qweight = torch.empty(0, device=next(iter(base_layer.stored().values())).device)

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """`x` `[..., K]` -> `[..., N]`."""
            own: Any = self  # its attributes are peft's
            y: Tensor = own.base_layer(x)
            for name in () if own.disable_adapters else own.active_adapters:
                if name in own.lora_A:
                    inner, outer = own.lora_A[name], own.lora_B[name]
                    update = outer(inner(own.lora_dropout[name](x.to(inner.weight.dtype))))
                    y = y + (update * own.scaling[name]).to(y.dtype)
            return y

    return CompressedLoraLinear
