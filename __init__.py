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
    from .compress.plan import plan
    from .compress.recipe import Recipe
    from .compress.report import CompressionReport
    from .compress.sparsity_sweep import sweep
    from .eval.compare import compare
    from .eval.perplexity import evaluate
    from .eval.tasks import evaluate_tasks
    from .serving.errors import HalfweightError, InputError, RunError
    from .serving.inspect import inspect_checkpoint
    from .serving.load import load, load_tokenizer
    from .serving.sources import resolve_model
    from .serving.warmup import explain, warmup

__all__ = [
    "CompressionReport",
    "HalfweightError",
    "InputError",
    "Recipe",
    "RunError",
    "compare",
    "compress_checkpoint",
    "evaluate",
    "evaluate_tasks",
    "explain",
    "inspect_checkpoint",
    "load",
    "load_tokenizer",
    "plan",
    "resolve_model",
    "sweep",
    "warmup",
]

_HOME = {
    "CompressionReport": "compress.report",
    "HalfweightError": "serving.errors",
    "InputError": "serving.errors",
    "Recipe": "compress.recipe",
    "RunError": "serving.errors",
    "compare": "eval.compare",
    "compress_checkpoint": "compress.driver",
    "evaluate": "eval.perplexity",
    "evaluate_tasks": "eval.tasks",
    "explain": "serving.warmup",
    "inspect_checkpoint": "serving.inspect",
    "load": "serving.load",
    "load_tokenizer": "serving.load",
    "plan": "compress.plan",
    "resolve_model": "serving.sources",
    "sweep": "compress.sparsity_sweep",
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
