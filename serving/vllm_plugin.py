"""halfweight checkpoints in vLLM: `vllm serve DIR` and `LLM(DIR)` work once halfweight is installed beside vLLM.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in every process. It names a class
that `vllm_layers.py` defines, so vLLM's own modules are imported only here, inside vLLM.
"""

from __future__ import annotations

from .scheme import QUANT_METHOD


def register() -> None:
    """Make vLLM know `quant_method: halfweight`; may be called any number of times."""
    from vllm.model_executor.layers import quantization

    from .vllm_layers import HalfweightConfig

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(QUANT_METHOD)(HalfweightConfig)
