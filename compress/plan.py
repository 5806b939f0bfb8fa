"""What a compression run will do, need and take, from the config and shard headers alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from pydantic import BaseModel

from ..serving.load import resolve_device, stored_dtype
from ..serving.scheme import FUSED
from ..serving.sources import resolve_model
from ..serving.storage import stored_bits
from ..serving.tables import Table
from .blocks import BlockWalker, batch_size, compute_dtype, open_dense
from .calibration import check_context, dev_windows
from .fisher import LEVELS, TOKENS
from .outline import Outline, has_weights
from .passes import PASSES, StageConfig, needs_of
from .recipe import Embeddings, Recipe
from .search.config import Search
from .search.fitness import GATHERED, TOP
from .search.run import space_of
from .sensitivity import GRADIENT_BATCHES
from .streams import (
    activation_bytes,
    check_budget,
    paused_numbers,
    spilled_bytes,
    stream_bytes,
    stream_tokens,
)
from .tuning.cost import BASE, Cost, Workload, block_cost, end_to_end_cost
from .vocabulary import check_supported

_LATE_CODE = 85e6  # bytes of code, tables and thread buffers that a run loads and `plan` does not (measured)
_MATMUL_SHARE = 0.6  # assumed fraction of large-matmul speed that a whole run reaches


class PlannedLayer(BaseModel):
    """One linear or table `[N, K]`: what will happen to it, and its stored bits per weight before and after."""

    name: str
    shape: tuple[int, int]
    method: str
    pattern: str
    bits_before: float
    bits_after: float


class PlannedStage(BaseModel):
    """One stretch of the run: an `allocation` over all blocks, a `search`, the passes (`compress`), or a stage of
    tuning; modelled.

    In 10^9 bytes, `device_gb` is held on the computing device (on a CPU that is the host), `host_gb` in host memory
    beside a GPU, `disk_gb` on disk beyond the checkpoint until the run is over. `tokens` are calibrated, tried or
    trained on, repeats included.
    """

    name: Literal["allocation", "search", "compress", "block", "end_to_end"]
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
    speed = matmul_speed(walker.device, walker.dtype) * _MATMUL_SHARE
    bandwidth = _bandwidth(walker.device)
    found = []
    if any(stage.selection is not None and stage.selection.allocation == "fisher" for stage in stages.values()):
        found.append(_allocation_stage(walker, recipe, shapes, speed, bandwidth))
    if recipe.search is not None:
        found.append(_search_stage(walker, recipe, recipe.search, stages, shapes, speed))
    spilled = spilled_bytes(recipe, shapes, work.hidden, work.itemsize) if spill else 0.0
    found += [
        PlannedStage(
            name="compress",
            tokens=calibration.samples * calibration.seqlen,
            device_gb=_peak_bytes(walker, recipe, stages, shapes, spill) / 1e9,
            host_gb=BASE / 1e9,
            disk_gb=(packed + spilled) / 1e9,
            seconds=_seconds(walker, recipe, stages, shapes, speed, spill),
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


def _allocation_stage(
    walker: BlockWalker, recipe: Recipe, shapes: Mapping[str, tuple[int, int]], speed: float, bandwidth: float
) -> PlannedStage:
    """A forward and a backward pass, block by block; a batch of gradients, or the head; all blocks' inputs on the host.

    The backward pass of a block runs it again, and multiplies with its weights twice. At every level the inputs are
    compared (5 bytes), chosen (9) and added up (4).
    """
    text, size, calibration = walker.model.config.get_text_config(), walker.dtype.itemsize, recipe.calibration
    tokens = min(calibration.samples, max(1, TOKENS // calibration.seqlen)) * calibration.seqlen
    batch = batch_size(calibration.seqlen) * calibration.seqlen
    weights, head = sum(prod(shape) for shape in shapes.values()), text.vocab_size * text.hidden_size
    blocks = [[shapes[name] for name in walker.block_linears(index)] for index in range(walker.n_blocks)]
    numbers = max(sum(prod(shape) + 2 * batch * sum(shape) for shape in block) for block in blocks)
    inputs = sum(k for _, k in shapes.values())
    return PlannedStage(
        name="allocation",
        tokens=tokens,
        device_gb=(max(numbers, head) + 2 * tokens * text.hidden_size) * size / 1e9,
        host_gb=(BASE + walker.n_blocks * tokens * text.hidden_size * size) / 1e9,
        disk_gb=0.0,
        seconds=(8.0 * weights + 6.0 * head) * tokens / speed + 18 * len(LEVELS) * tokens * inputs / bandwidth,
    )


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
    gathered = min(calibration.samples, max(1, GATHERED // calibration.seqlen)) * calibration.seqlen
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


def _inputs(stages: Mapping[str, StageConfig], shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Compressed linears by the input they share, keyed by the first of them."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in shapes:
        if name in stages:
            parent, _, tail = name.rpartition(".")
            fused = next((group for group in FUSED if tail in group), tail)
            groups.setdefault((parent, fused), []).append(name)
    return {members[0]: members for members in groups.values()}


def _peak_bytes(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    spill: bool,
) -> float:
    """Bytes while blocks are solved, the larger of: quantized tables, and the activation streams with either the rows
    embedded or one block at work. Where they `spill`, one batch of them, and in the end the dev set's outputs."""
    size = walker.dtype.itemsize
    text = walker.model.config.get_text_config()
    calibration, (compressed, dense) = recipe.calibration, stream_tokens(recipe)
    streams = 0.0 if spill else stream_bytes(recipe, text.hidden_size, size)
    outputs = dense * text.hidden_size * size
    if spill:
        compressed = min(compressed, batch_size(calibration.seqlen) * calibration.seqlen)
    embedded = 2 * min(text.vocab_size, compressed) * text.hidden_size * size  # the rows, one by one and together
    block = 0.0
    for index in range(walker.n_blocks):
        names = list(walker.block_linears(index))
        held = float(sum(prod(shapes[n]) for n in names) * size)
        held += sum(_packed_bytes(stages[n], shapes[n], walker.dtype) for n in names if n in stages)
        paused = compressed * paused_numbers(text.hidden_size, (shapes[n] for n in names)) * size
        transient = 2 * calibration.seqlen * sum(shapes[n][0] for n in names) * size
        solver = 0
        for first, members in _inputs(stages, {n: shapes[n] for n in names}).items():
            rows = max(shapes[name][0] for name in members)
            solver = max(solver, _solver_bytes(stages[first], rows, shapes[first][1]))
        gradients = 0  # what a backward pass through the block needs
        if any(stages[name].needs_gradients for name in names if name in stages):
            gradients = (
                batch_size(calibration.seqlen) * calibration.seqlen * 2 * size * sum(sum(shapes[n]) for n in names)
            )
        block = max(block, held + paused + max(solver, transient), held + gradients)
    written = 0.0  # quantized tables are held whole, and once more as bytes on their way to the disk
    if recipe.embeddings is not None:
        scheme = recipe.embeddings.integers().dense
        written = 2 * sum(stored_bits(scheme, table.shape, walker.dtype) / 8 for table in walker.tables().values())
    return max(written, outputs, streams + max(embedded, block))


def _solver_bytes(stage: StageConfig, n: int, k: int) -> int:
    """What is held while a linear `[N, K]` is solved."""
    like_weight, like_hessian = PASSES[stage.name].arrays
    if stage.low_rank is not None:  # solved again beside what was found before
        like_weight, like_hessian = like_weight + 5, max(like_hessian + 1, 3)
    if stage.selection is not None and stage.selection.fits:
        like_hessian = max(like_hessian, 3)
    return 4 * (n * k * like_weight + k * k * like_hessian)


class Work(NamedTuple):
    """What one of several processes does to compress, tuning aside: `operations` in the run's dtype for its share of
    the tokens, fp32 operations of `solvers` it works or waits for, `exchanged` bytes that it gets from others, and
    bytes of weights that it has `read`."""

    operations: float
    solvers: float
    exchanged: float
    read: float


def _seconds(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    speed: float,
    spill: bool,
) -> float:
    """The work of one process at this device's measured matmul speeds: `speed` in the run's dtype."""
    work = work_of(walker, recipe, stages, shapes)
    again = 2.0 * stream_tokens(recipe)[0] * _weights_again(walker, stages, shapes) if spill else 0.0
    slow = matmul_speed(walker.device, torch.float32)
    return (work.operations + again) / speed + work.solvers / (slow * _MATMUL_SHARE)


def _weights_again(
    walker: BlockWalker, stages: Mapping[str, StageConfig], shapes: Mapping[str, tuple[int, int]]
) -> int:
    """Weights that passes go through once more when they start over for each input of a block: all before it."""
    total = 0
    for index in range(walker.n_blocks):
        before = 0
        for members in _inputs(stages, {name: shapes[name] for name in walker.block_linears(index)}).values():
            total += before
            before += sum(prod(shapes[name]) for name in members)
    return total


def work_of(
    walker: BlockWalker,
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    shapes: Mapping[str, tuple[int, int]],
    processes: int = 1,
) -> Work:
    """Forward passes, Hessians, solvers and the dev set's logits, modelled, divided over `processes` as a run does."""
    text = walker.model.config.get_text_config()
    calibration, (compressed, dense) = recipe.calibration, stream_tokens(recipe)
    tokens = calibration.samples * calibration.seqlen
    # The dev set runs through the reloaded checkpoint too, and its logits are computed dense and compressed.
    operations = 2.0 * (compressed + 2 * dense) * sum(prod(shape) for shape in shapes.values())
    operations += 2 * 2.0 * dense * text.vocab_size * text.hidden_size
    stored, solvers, exchanged = walker.stored(), 0.0, 0.0
    for first, members in _inputs(stages, shapes).items():
        stage, k = stages[first], shapes[first][1]
        for name in members if processes > 1 else ():
            exchanged += _packed_bytes(stages[name], shapes[name], stored[f"{name}.weight"].dtype)
        if needs_of(stage) == "hessian":
            exchanged += 6.0 * k * k if processes > 1 else 0.0  # half a matrix along the chain, then the whole
            operations += tokens * k * k * 1.3
            rounds = 1 + sum(getattr(stage, work, 0) for work in ("iterations", "refine", "descents"))
            rounds *= 1 if stage.low_rank is None else 2  # it is solved twice
            rows = [shapes[name][0] for name in members]
            largest = [max(rows[i : i + processes]) for i in range(0, len(rows), processes)]
            solvers += sum(2.0 * n * k * k * rounds for n in largest)
        if any(stages[name].needs_gradients for name in members):  # a forward and a backward pass, and the gradient's
            few = min(tokens, GRADIENT_BATCHES * batch_size(calibration.seqlen) * calibration.seqlen)
            operations += 8.0 * few * sum(prod(shapes[name]) for name in members)
        if stage.selection is not None and stage.selection.fits:
            operations += tokens * k * k * 1.3 * len(members)  # what is not read differs from linear to linear
    return Work(operations / processes, solvers, exchanged, float(sum(info.nbytes for info in stored.values())))


def _packed_bytes(stage: StageConfig, shape: tuple[int, int], stored: torch.dtype) -> float:
    """Bytes of what is stored for a linear."""
    return stored_bits(stage.scheme(shape), shape, stored) / 8


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 64 MB on `device` reads and writes, the best of four."""
    a = torch.zeros(2**24, device=device)
    best = 0.0
    for _ in range(4):
        start = time.monotonic()
        float(a.clone()[0])  # reading a value waits for the device
        best = max(best, 2 * a.nbytes / (time.monotonic() - start))
    return best


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a 1024-cube matmul on `device`, the best of several over about 0.2 seconds."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    a @ a  # the first may compile, or wake threads, for longer than that
    best, begin = 0.0, time.monotonic()
    while time.monotonic() - begin < 0.2:
        start = time.monotonic()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = max(best, 2 * 1024**3 / (time.monotonic() - start))
    return best
