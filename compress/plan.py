"""What a compression run will do, need and take, from the config and shard headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel

from ..serving.load import resolve_device, stored_dtype
from ..serving.sources import resolve_model
from ..serving.storage import stored_bits
from ..serving.tables import Table
from . import basis
from .backward import TOKENS
from .blocks import BlockWalker, batch_size, compute_dtype, open_dense
from .calibration import check_context, dev_windows, first_tokens
from .cost import MATMUL_SHARE, bandwidth_of, matmul_speed, peak_bytes, seconds_of
from .fisher import LEVELS, REFITS
from .outline import Outline, has_weights
from .passes import StageConfig
from .recipe import Basis, Embeddings, Recipe
from .search.config import Search
from .search.fitness import GATHERED, TOP
from .search.run import space_of
from .streams import (
    activation_bytes,
    check_budget,
    spilled_bytes,
)
from .tuning.cost import BASE, Cost, Workload, block_cost, end_to_end_cost
from .vocabulary import check_supported

_LATE_CODE = 85e6  # bytes of code, tables and thread buffers that a run loads and `plan` does not (measured)


class PlannedLayer(BaseModel):
    """One linear or table `[N, K]`: what will happen to it, and its stored bits per weight before and after."""

    name: str
    shape: tuple[int, int]
    method: str
    pattern: str
    bits_before: float
    bits_after: float


class PlannedStage(BaseModel):
    """One stretch of the run: a change of `basis`, an `allocation` over all blocks, a `search`, the `metric` by which
    blocks are tuned, the passes (`compress`), or a stage of tuning; modelled.

    In 10^9 bytes, `device_gb` is held on the computing device (on a CPU that is the host), `host_gb` in host memory
    beside a GPU, `disk_gb` on disk beyond the checkpoint until the run is over. `tokens` are calibrated, tried or
    trained on, repeats included.
    """

    name: Literal["basis", "allocation", "search", "metric", "compress", "block", "end_to_end"]
    tokens: int
    device_gb: float
    host_gb: float
    disk_gb: float
    seconds: float


class Plan(BaseModel):
    """`peak_memory_gb` (10^9 bytes) and `seconds` are modelled, from byte counts and the speed of one matmul on this
    device; bits are defined as in `Inspection`. `activations_gb` is what the streams of activations and the passes that
    pause need; `activations_spill` says that this is more than `activation_memory`, so that files hold them instead."""

    model: str
    recipe: str
    effective_bits: float
    effective_bits_model: float
    peak_memory_gb: float
    activations_gb: float
    activations_spill: bool
    seconds: float
    device: str
    dtype: str
    blocks: int
    parameters: int
    layers: list[PlannedLayer]
    stages: list[PlannedStage]


def plan(
    model: str | Path,
    recipe: Recipe | str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    activation_memory: float | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan the compression of `model` by `recipe` (arguments as in `compress_checkpoint`); reads no weights.

    A folder with nothing but a config.json will do. Raises InputError for everything that `compress_checkpoint` would
    refuse before it starts.
    """
    check_budget(activation_memory)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    source = resolve_model(str(model), trust_remote_code=trust_remote_code, weights=False)
    checkpoint = open_dense(source.path) if has_weights(source.path) else Outline(source.path)
    where = resolve_device(device)
    walker = BlockWalker(checkpoint, where, compute_dtype(dtype, where, stored_dtype(checkpoint)))
    shapes = walker.linear_shapes()
    check_context(recipe.calibration, walker.max_length)
    stages = recipe.resolve(shapes)

    tensors = walker.stored()
    layers = []
    linear_bits = 0.0
    for name, shape in shapes.items():
        stored = tensors[f"{name}.weight"].dtype
        before = 8.0 * stored.itemsize
        after = stored_bits(stages[name].scheme(shape), shape, stored) / prod(shape) if name in stages else before
        linear_bits += after * prod(shape)
        layers.append(
            PlannedLayer(
                name=name,
                shape=shape,
                method=stages[name].name if name in stages else "-",
                pattern=stages[name].structure if name in stages else "dense",
                bits_before=before,
                bits_after=after,
            )
        )
    weights = sum(prod(shape) for shape in shapes.values())
    biases = [tensors[f"{name}.bias"] for name in shapes if f"{name}.bias" in tensors]
    linear_bits += 8 * sum(info.nbytes for info in biases)
    linear_parameters = weights + sum(prod(info.shape) for info in biases)
    counted = {f"{name}.{suffix}" for name in shapes for suffix in ("weight", "bias")}
    rest = {name: info for name, info in tensors.items() if name not in counted}
    rest_parameters = sum(prod(info.shape) for info in rest.values())
    rest_bits = 8.0 * sum(info.nbytes for info in rest.values())
    if recipe.embeddings is not None:
        check_supported(checkpoint, recipe.embeddings)
        for table in walker.tables().values():
            layer = _planned_table(table, recipe.embeddings)
            rest_bits += (layer.bits_after - layer.bits_before) * prod(table.shape)
            layers.append(layer)
    hidden = walker.model.config.get_text_config().hidden_size
    activations = activation_bytes(recipe, shapes, hidden, walker.dtype.itemsize)
    spill = activation_memory is not None and activations > activation_memory * 1e9
    planned = _stages(walker, recipe, stages, shapes, linear_bits / 8, spill)
    memory = psutil.Process().memory_info().rss
    return Plan(
        model=source.name,
        recipe=recipe.name,
        effective_bits=linear_bits / linear_parameters,
        effective_bits_model=(linear_bits + rest_bits) / (linear_parameters + rest_parameters),
        peak_memory_gb=(memory + _LATE_CODE) / 1e9 + max(stage.device_gb for stage in planned),
        activations_gb=activations / 1e9,
        activations_spill=spill,
        seconds=sum(stage.seconds for stage in planned),
        device=str(where),
        dtype=str(walker.dtype).removeprefix("torch."),
        blocks=walker.n_blocks,
        parameters=linear_parameters + rest_parameters,
        layers=layers,
        stages=planned,
    )


def _stages(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    packed: float,
    spill: bool,
) -> list[PlannedStage]:
    """What each stretch of the run needs and takes; packed linears have `packed` bytes, activations `spill` or not."""
    calibration, tuning = recipe.calibration, recipe.tuning
    text = walker.model.config.get_text_config()
    samples = 0 if tuning is None else tuning.samples or 0
    work = Workload(
        blocks=[{name: shapes[name] for name in walker.block_linears(index)} for index in range(walker.n_blocks)],
        stages=stages,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=walker.dtype.itemsize,
        windows=max(calibration.samples, samples),
        dev=dev_windows(calibration.samples, samples),
        length=calibration.seqlen,
        packed=packed,
        spill=spill,
    )
    speed = matmul_speed(walker.device, walker.dtype) * MATMUL_SHARE
    bandwidth = bandwidth_of(walker.device)
    found = []
    if recipe.basis is not None:
        found.append(_basis_stage(walker, recipe, recipe.basis, shapes, speed, bandwidth))
    if any(stage.shares_by_fisher for stage in stages.values()):
        found.append(_allocation_stage(walker, recipe, stages, shapes, speed, bandwidth))
    if recipe.search is not None:
        found.append(_search_stage(walker, recipe, recipe.search, stages, shapes, speed))
    if tuning is not None and tuning.block is not None:
        found.append(_metric_stage(walker, recipe, work, speed))
    spilled = spilled_bytes(recipe, shapes, work.hidden, work.itemsize) if spill else 0.0
    found += [
        PlannedStage(
            name="compress",
            tokens=calibration.samples * calibration.seqlen,
            device_gb=peak_bytes(walker, recipe, stages, shapes, spill) / 1e9,
            host_gb=BASE / 1e9,
            disk_gb=(packed + spilled) / 1e9,
            seconds=seconds_of(walker, recipe, stages, shapes, speed, spill),
        )
    ]
    costs: list[tuple[Literal["block", "end_to_end"], Cost]] = []
    if tuning is not None and tuning.block is not None:
        costs.append(("block", block_cost(work, tuning.block)))
    if tuning is not None and tuning.end_to_end is not None:
        costs.append(("end_to_end", end_to_end_cost(work, tuning.end_to_end)))
    for name, cost in costs:
        found.append(
            PlannedStage(
                name=name,
                tokens=cost.tokens,
                device_gb=cost.device / 1e9,
                host_gb=cost.host / 1e9,
                disk_gb=cost.disk / 1e9,
                seconds=cost.operations / speed + cost.moved / bandwidth,
            )
        )
    return found


def _basis_stage(
    walker: BlockWalker,
    recipe: Recipe,
    settings: Basis,
    shapes: Mapping[str, tuple[int, int]],
    speed: float,
    bandwidth: float,
) -> PlannedStage:
    """A forward pass of the dense model; tensors along the axes read, changed along their dimensions, and written."""
    text, size, calibration = walker.model.config.get_text_config(), walker.dtype.itemsize, recipe.calibration
    tokens = first_tokens(calibration, basis.TOKENS)
    blocks = [sum(prod(shapes[name]) for name in walker.block_linears(index)) for index in range(walker.n_blocks)]
    tensors, parts = walker.stored(), basis.parts(walker, settings, basis.tensor_axes(walker))
    stored = [tensors[name].nbytes for name in chain(*parts.values())]
    moved = 6.0 * sum(stored) / bandwidth
    return PlannedStage(
        name="basis",
        tokens=tokens,
        device_gb=(max(blocks) + tokens * text.hidden_size) * size / 1e9,
        host_gb=(BASE + 2 * max(stored)) / 1e9,
        disk_gb=sum(stored) / 1e9,
        seconds=2.0 * (sum(blocks) * tokens + text.vocab_size * text.hidden_size * calibration.seqlen) / speed + moved,
    )


def _allocation_stage(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    speed: float,
    bandwidth: float,
) -> PlannedStage:
    """A forward and a backward pass, block by block; a batch of gradients, or the head; all blocks' inputs on the host,
    and a block's outputs.

    For a selection, at every level the inputs are compared (5 bytes), chosen (9) and added up (4). Linears to prune
    hold their inputs and gradients until the block is through; at every level they are fitted again and multiply, in
    fp32.
    """
    text, size, calibration = walker.model.config.get_text_config(), walker.dtype.itemsize, recipe.calibration
    tokens = first_tokens(calibration, TOKENS)
    batch, head = batch_size(calibration.seqlen) * calibration.seqlen, text.vocab_size * text.hidden_size
    sharing = {name: shapes[name] for name, stage in stages.items() if stage.shares_by_fisher}
    pruned = {name: shape for name, shape in sharing.items() if stages[name].selection is None}
    numbers = 0
    for index in range(walker.n_blocks):
        block = {name: shapes[name] for name in walker.block_linears(index)}
        held = sum(sum(shape) for name, shape in block.items() if name in pruned)
        numbers = max(numbers, sum(prod(shape) + 2 * batch * sum(shape) for shape in block.values()) + tokens * held)
    compared = sum(shapes[name][1] for name in sharing if name not in pruned)
    fitted = sum(2.0 * n * k * ((REFITS + 1) * k + tokens) for n, k in pruned.values())
    return PlannedStage(
        name="allocation",
        tokens=tokens,
        device_gb=(max(numbers, head) + 2 * tokens * text.hidden_size) * size / 1e9,
        host_gb=(BASE + (walker.n_blocks + 1) * tokens * text.hidden_size * size) / 1e9,
        disk_gb=0.0,
        seconds=_backward_operations(shapes.values(), head) * tokens / speed
        + 18 * len(LEVELS) * tokens * compared / bandwidth
        + len(LEVELS) * fitted / (matmul_speed(walker.device, torch.float32) * MATMUL_SHARE),
    )


def _metric_stage(walker: BlockWalker, recipe: Recipe, work: Workload, speed: float) -> PlannedStage:
    """As `_allocation_stage`, without what it does to linears."""
    calibration, hidden, size = recipe.calibration, work.hidden, work.itemsize
    tokens, head = first_tokens(calibration, TOKENS), work.vocabulary * hidden
    batch = batch_size(calibration.seqlen) * calibration.seqlen
    numbers = max(sum(n * k + 2 * batch * (n + k) for n, k in block.values()) for block in work.blocks)
    shapes = [shape for block in work.blocks for shape in block.values()]
    return PlannedStage(
        name="metric",
        tokens=tokens,
        device_gb=(max(numbers, head) + 2 * tokens * hidden) * size / 1e9,
        host_gb=(BASE + (walker.n_blocks + 1) * tokens * hidden * size) / 1e9,
        disk_gb=4.0 * walker.n_blocks * hidden / 1e9,
        seconds=_backward_operations(shapes, head) * tokens / speed,
    )


def _backward_operations(shapes: Iterable[tuple[int, int]], head: int) -> float:
    """Operations per token of `backward`: a block's backward pass runs it again, and multiplies with its weights
    twice; the head's multiplies twice."""
    return 8.0 * sum(prod(shape) for shape in shapes) + 6.0 * head


def _search_stage(
    walker: BlockWalker,
    recipe: Recipe,
    search: Search,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    speed: float,
) -> PlannedStage:
    """The dense model in memory, with branches and the activations of a trial; a forward pass for each of them."""
    text, size, space = walker.model.config.get_text_config(), walker.dtype.itemsize, space_of(walker, search, stages)
    branches = sum(space.largest_rank(member) * sum(member.shape) for member in space.members.values())
    weights = sum(prod(shape) for shape in shapes.values())
    head = text.vocab_size * text.hidden_size
    calibration = recipe.calibration
    gathered = first_tokens(calibration, GATHERED)
    windows = search.samples * search.seqlen
    tried = windows * (search.trials + 1)
    activations = (gathered + 2 * windows) * text.hidden_size * size + windows * TOP * 12  # the dense predictions
    return PlannedStage(
        name="search",
        tokens=tried,
        device_gb=((weights + head + branches) * size + activations) / 1e9,
        host_gb=BASE / 1e9,
        disk_gb=0.0,
        seconds=2.0 * (gathered * weights + tried * (weights + head)) / speed,
    )


def _planned_table(table: Table, settings: Embeddings) -> PlannedLayer:
    """What happens to a dense embedding or head."""
    stored = table.tensors["weight"].dtype
    return PlannedLayer(
        name=table.name,
        shape=table.shape,
        method="rtn",
        pattern=settings.numbers,
        bits_before=8.0 * stored.itemsize,
        bits_after=stored_bits(settings.integers().dense, table.shape, stored) / prod(table.shape),
    )
