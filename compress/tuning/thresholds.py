"""The thresholds of a tuned block, anew: training moves what its linears see, and by the thresholds that they had
tokens would read more or less than they should."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...serving.linear import SelectingLinear
from ...serving.storage import pack_selection, selection_of
from ...triton_kernels.formats.bits import from_bits
from ..allocation import selection_of_stage
from ..lockstep import input_groups
from ..passes import StageConfig
from ..passes.selection import read_share, scores, threshold_of
from ..quantiles import QuantileSketch

See = Callable[[nn.Module, tuple[Any, ...]], None]


def has_threshold(stage: StageConfig) -> bool:
    """Whether a linear of `stage` has a threshold that follows from the share of its inputs that tokens read."""
    return stage.selection is not None and stage.selection.threshold == "fixed" and stage.selection.truncation is None


def meet_shares(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, SelectingLinear],
    stages: Mapping[str, StageConfig],
    inputs: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Give `linears` of a block, whose stages (by name) are such and which have selections, thresholds by which the
    block's calibration `inputs` read the share that the stages allow; returns what is stored of them, by full name.

    `run` is the block's forward pass. Linears that follow others see what these make of their new thresholds.
    """
    stored: dict[str, Tensor] = {}
    for group in input_groups(linears, lambda: run(inputs[0])):
        sketches = {name: QuantileSketch() for name in group}
        norms = {name: _norms(linears[name]) for name in group}

        def see(name: str) -> See:
            return lambda module, args: sketches[name].add(scores(args[0], norms[name]))  # noqa: B023

        _watch(run, {name: linears[name] for name in group}, see, inputs)
        for name in group:
            linear, settings = linears[name], selection_of_stage(stages[name])
            shape = (linear.out_features, linear.in_features)
            scheme = stages[name].scheme(shape)
            chosen = threshold_of(sketches[name], norms[name], settings, scheme, shape)
            packed = {key: part.to(linear.weight.device) for key, part in pack_selection(scheme, chosen).items()}
            linear.selection = selection_of(scheme, packed)
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return stored


def shares_read(
    run: Callable[[Tensor], Tensor], linears: Mapping[str, SelectingLinear], inputs: Sequence[Tensor]
) -> dict[str, float]:
    """The share of its inputs that each of `linears` reads when the block runs on `inputs`."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    _watch(run, linears, lambda name: lambda module, args: seen[name].append(args[0]), inputs)
    return {name: read_share(seen[name], linear) for name, linear in linears.items()}


def _watch(
    run: Callable[[Tensor], Tensor],
    linears: Mapping[str, nn.Module],
    see: Callable[[str], See],
    inputs: Sequence[Tensor],
) -> None:
    """Run the block on `inputs`, with `see(name)` as a hook before each of `linears`."""
    handles = [linear.register_forward_pre_hook(see(name)) for name, linear in linears.items()]
    try:
        for x in inputs:
            run(x)
    finally:
        for handle in handles:
            handle.remove()


def _norms(linear: SelectingLinear) -> Tensor | None:
    """What a linear's scores are multiplied with, fp32 `[K]`."""
    assert linear.selection is not None  # by the tensors that are stored for it
    norms = linear.selection.norms
    return None if norms is None else from_bits(norms)[0]
