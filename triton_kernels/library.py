"""Registering operators with torch, once: `torch.ops.halfweight.<name>`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

NAMESPACE = "halfweight"
_fragments: list[torch.library.Library] = []  # a Library unregisters its operators when it is collected


def register(schema: str, implementations: Mapping[str, Callable[..., Any]], fake: Callable[..., Any]) -> None:
    """Define the operator of `schema`, such as `"int4(Tensor x, Tensor codes) -> Tensor"`; a second call does nothing.

    `implementations`: dispatch key (`CPU`, `CUDA`, `CompositeExplicitAutograd`) -> function. `fake` gives shape and
    dtype of the result for tracing.
    """
    name = schema.partition("(")[0]
    if hasattr(getattr(torch.ops, NAMESPACE), name):
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key, function in implementations.items():
        library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _fragments.append(library)
