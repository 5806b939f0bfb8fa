"""Registers halfweight with transformers when transformers is imported, so that `import halfweight` stays light."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_on_import() -> None:
    """Make transformers know `quant_method: halfweight`: now if its registry is loaded, else once it is. Idempotent."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _register(registry)
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register(registry: ModuleType) -> None:
    from .transformers_plugin import register

    register(registry)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds transformers' quantizer registry with the ordinary finder and registers right after it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
