"""halfweight: compress language models with structure that GPUs can use, and run them.

    import halfweight
    report = halfweight.compress_checkpoint("demo", "2of4-admm", "smollm2-2of4")
    model = halfweight.load("smollm2-2of4")
    print(halfweight.evaluate("smollm2-2of4").perplexity)

Importing this package registers halfweight checkpoints with transformers; nothing else happens until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .compress.driver import compress_checkpoint
    from .compress.export.delta import apply_delta, make_delta
    from .compress.export.job import export_checkpoint
    from .compress.plan import plan
    from .compress.recipe import Recipe
    from .compress.report import CompressionReport
    from .compress.sparsity_sweep import sweep
    from .compress.verify import verify_checkpoint
    from .eval.compare import compare
    from .eval.perplexity import evaluate
    from .eval.tasks import evaluate_tasks
    from .serving.errors import HalfweightError, InputError, RunError
    from .serving.inspect import inspect_checkpoint
    from .serving.load import load, load_tokenizer
    from .serving.lora import lora_config
    from .serving.sources import resolve_model
    from .serving.warmup import Choice, explain, warmup

__all__ = [
    "Choice",
    "CompressionReport",
    "HalfweightError",
    "InputError",
    "Recipe",
    "RunError",
    "apply_delta",
    "compare",
    "compress_checkpoint",
    "evaluate",
    "evaluate_tasks",
    "explain",
    "export_checkpoint",
    "inspect_checkpoint",
    "load",
    "load_tokenizer",
    "lora_config",
    "make_delta",
    "plan",
    "resolve_model",
    "sweep",
    "verify_checkpoint",
    "warmup",
]

_HOME = {
    "Choice": "serving.warmup",
    "CompressionReport": "compress.report",
    "HalfweightError": "serving.errors",
    "InputError": "serving.errors",
    "Recipe": "compress.recipe",
    "RunError": "serving.errors",
    "apply_delta": "compress.export.delta",
    "compare": "eval.compare",
    "compress_checkpoint": "compress.driver",
    "evaluate": "eval.perplexity",
    "evaluate_tasks": "eval.tasks",
    "explain": "serving.warmup",
    "export_checkpoint": "compress.export.job",
    "inspect_checkpoint": "serving.inspect",
    "load": "serving.load",
    "load_tokenizer": "serving.load",
    "lora_config": "serving.lora",
    "make_delta": "compress.export.delta",
    "plan": "compress.plan",
    "resolve_model": "serving.sources",
    "sweep": "compress.sparsity_sweep",
    "verify_checkpoint": "compress.verify",
    "warmup": "serving.warmup",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; the public names are imported when they are first used.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_with_transformers() -> None:
    from .serving.plugin_hook import register_on_import

    register_on_import()


_register_with_transformers()
