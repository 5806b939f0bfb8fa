"""The few classes of vLLM that the plugin builds on, so that it is tested where vLLM is not installed.

They follow vLLM 0.32: attribute names, argument names and the order of calls are its own. scripts/vllm_check.py runs
the real thing.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


class QuantizeMethodBase:
    pass


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearBase(nn.Module):
    """A linear of one rank, column-parallel with `output_sizes` (of all ranks), or row-parallel."""

    def __init__(self, rank: int = 0, ranks: int = 1, output_sizes: tuple[int, ...] = (), input_size: int = 0) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.output_sizes, self.input_size = rank, ranks, output_sizes, input_size

    def create(self, method: Any, by_rows: bool, local: tuple[int, ...] = ()) -> None:
        """As vLLM's layers call it; `local` are the output sizes of this rank where they are not equal shares."""
        shares = [n // self.tp_size for n in self.output_sizes]
        method.create_weights(
            layer=self,
            input_size_per_partition=self.input_size // self.tp_size if by_rows else self.input_size,
            output_partition_sizes=list(self.output_sizes) if by_rows else list(local) or shares,
            input_size=self.input_size,
            output_size=sum(self.output_sizes),
            params_dtype=torch.float32,
            weight_loader=None,
        )


class VocabParallelEmbedding(nn.Module):
    """An embedding of `rows` rows, padded to a multiple of `padding` and cut over ranks."""

    def __init__(self, rows: int, hidden: int, rank: int = 0, ranks: int = 1, padding: int = 16) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.org_vocab_size = rank, ranks, rows
        self.share = -(-rows // padding) * padding // ranks
        start, end = rank * self.share, (rank + 1) * self.share
        self.shard_indices = SimpleNamespace(org_vocab_start_index=min(start, rows), org_vocab_end_index=min(end, rows))
        self.hidden = hidden

    def create(self, method: Any) -> None:
        method.create_weights(
            self, self.hidden, [self.share], self.hidden, self.share * self.tp_size, params_dtype=torch.float32
        )


class ParallelLMHead(VocabParallelEmbedding):
    pass


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the classes where the plugin imports them from; returns the module of the registry."""
    registry = SimpleNamespace(QUANTIZATION_METHODS=[], configs={})

    def register_quantization_config(name: str) -> Any:
        registry.QUANTIZATION_METHODS.append(name)
        return lambda config: registry.configs.setdefault(name, config)

    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {
            "QUANTIZATION_METHODS": registry.QUANTIZATION_METHODS,
            "register_quantization_config": register_quantization_config,
        },
        f"{layers}.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": QuantizeMethodBase,
        },
        f"{layers}.vocab_parallel_embedding": {
            "ParallelLMHead": ParallelLMHead,
            "VocabParallelEmbedding": VocabParallelEmbedding,
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    monkeypatch.delitem(sys.modules, "halfweight.serving.vllm_layers", raising=False)
    return registry
