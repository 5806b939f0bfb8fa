"""What the passes cost, modelled: bytes in memory, operations, and how fast this device does them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from ..serving.scheme import fused_groups
from ..serving.storage import stored_bits
from .blocks import BlockWalker, batch_size
from .passes import PASSES, StageConfig, needs_of
from .recipe import Recipe
from .sensitivity import GRADIENT_BATCHES
from .streams import paused_numbers, stream_bytes, stream_tokens

MATMUL_SHARE = 0.6  # assumed fraction of large-matmul speed that a whole run reaches


def _inputs(stages: Mapping[str, StageConfig], shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Compressed linears by the input they share, keyed by the first of them."""
    return {members[0]: members for members in fused_groups(name for name in shapes if name in stages)}


def peak_bytes(
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


def seconds_of(
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
    return (work.operations + again) / speed + work.solvers / (slow * MATMUL_SHARE)


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


def bandwidth_of(device: torch.device) -> float:
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
