"""Verdicts for a GPU that is not here: an artifact's linears in the kernels' cost model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from ..serving.checkpoint import Checkpoint
from ..serving.errors import InputError
from ..serving.load import stored_dtype
from ..serving.skeleton import build_skeleton
from ..triton_kernels import cost, registry, survey
from ..triton_kernels.launch import Shape
from .layer_speed import LayerSpeed, judge, kinds_of
from .timing import Spread


class ModelledSpeed(BaseModel):
    """Modelled verdicts on an artifact's linears; `times` says what the model was calibrated by, if at all."""

    folder: str
    device: str
    dtype: str
    times: str
    layers: list[LayerSpeed]


def model_layers(folder: str | Path, gpu: str, batches: Sequence[int], cache: Path | None) -> ModelledSpeed:
    """Model every kind of compressed linear in `folder` on `gpu` (a100, 4090, h100) for each of `batches` tokens.

    Kernels are compiled for the GPU and interpreted on this machine, in their default group sizes; `cache` keeps what
    was found. The dense rival streams its 16-bit weights ideally. Raises InputError for an unknown GPU, a missing
    Triton, a folder that is not an artifact, and a number of tokens that no kernel takes.
    """
    if gpu not in cost.GPUS:
        raise InputError(f"--gpu {gpu} is unknown; choose from {', '.join(cost.GPUS)}")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InputError("modelling a GPU needs Triton: pip install 'halfweight[cpu]' (Linux)") from None
    checkpoint = Checkpoint(folder)
    if checkpoint.artifact is None:
        raise InputError(f"{folder}: a dense checkpoint; bench judges the linears of a compressed one")
    if checkpoint.artifact.prompt_static:
        raise InputError(f"{folder}: linears with threshold: prompt run on plain matmuls, which are not modelled")
    device, stored = cost.GPUS[gpu], stored_dtype(checkpoint)
    dtype = str(stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16).removeprefix("torch.")
    kinds = kinds_of(build_skeleton(checkpoint, torch.float32))
    wanted = [
        (kind, members, tokens)
        for kind, members in kinds.items()
        for tokens in batches
        if all(_has_kernel(op, Shape(tokens, *kind[2]), dtype, device) for op in (_linear_op(kind[0]), "int4"))
    ]
    if not wanted:
        raise InputError(f"--batch: no kernel takes {', '.join(map(str, batches))} tokens; modelled are up to 8")
    cases = {
        survey.Case(op, Shape(tokens, *kind[2]), device.name, dtype)
        for kind, _, tokens in wanted
        for op in (_linear_op(kind[0]), "int4")
    }
    known = dict(survey.facts(sorted(cases), device, cache))
    layers = []
    for kind, members, tokens in wanted:
        n, k = kind[2]
        shape = Shape(tokens, n, k)

        def microseconds(op: str, shape: Shape = shape) -> float:
            return known[survey.Case(op, shape, device.name, dtype)].microseconds

        times = {
            "compressed": microseconds(_linear_op(kind[0])),
            "int4": microseconds("int4"),
            "dense": cost.stream_microseconds(device, 2 * (n * k + tokens * (n + k))),
        }
        spreads = {form: Spread.of([taken]) for form, taken in times.items()}
        layers.append(judge(kind, members, tokens, dtype, spreads, "modelled"))
    return ModelledSpeed(folder=str(folder), device=device.title, dtype=dtype, times=device.source, layers=layers)


def _linear_op(op: str) -> str:
    return "int4" if op == "tied" else op


def _has_kernel(op: str, shape: Shape, dtype: str, gpu: cost.GPU) -> bool:
    try:
        return bool(registry.steps(op, shape, getattr(torch, dtype), gpu.target))
    except LookupError:
        return False
