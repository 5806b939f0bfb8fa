"""How far can this model be pruned? Every method, pattern and density in one walk through the model.

Essential sparsity (Jaiswal et al. 2023, arXiv 2306.03805) prunes the pretrained weights at once, level by level, and
looks where quality breaks; embeddings, norms and the head stay. Here each block is loaded once: its linears' statistics
are collected from the dense model's inputs, every cell prunes the same dense weights with them, and sends its own
activations on. So one calibration pass serves all cells, and only a block is in memory. Since no cell's own inputs are
calibrated on, a cell is a little worse than `compress` makes it; the controls and the shape of the curves are not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..eval.perplexity import check_context, summarize
from ..eval.significance import mean_and_error
from ..eval.sweep_report import SweepPoint, SweepReport, curves_of
from ..eval.text import bos_token, builtin_text, exact_windows, read_text, tokenize
from ..serving.checkpoint import read_json
from ..serving.durable import commit, disk_errors, write_text
from ..serving.errors import InputError, RunError
from ..serving.load import load_tokenizer, resolve_device, stored_dtype
from ..serving.sources import resolve_model
from .blocks import BlockWalker, batch_size, compute_dtype, open_dense
from .calibration import load_windows
from .cells import Cell, check_shapes, erk_densities, plan_cells, prune
from .journal import fingerprint
from .lockstep import input_groups
from .memory import release_memory
from .passes.hessian import HessianError
from .recipe import Calibration
from .report import OnProgress, Progress, silent
from .statistics import InputStatistics

REPORT = "sweep.json"
_STATE = "state.safetensors"
_IDENTITY = "fingerprint"
_STREAM_BYTES = 4 * 2**30  # activations of the cells that walk together
_SAVE_SECONDS = 60.0  # an interrupted sweep loses about this much work, and a block


@dataclass
class _Walk:
    """Activations `[windows, T, D]` behind the first `done` blocks: of the dense model on calibration and evaluation
    windows, and of each of the `cells` on the latter (`streams`)."""

    cells: list[Cell]
    calibration: Tensor
    dense: Tensor
    streams: list[Tensor]
    done: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        own = {f"cell.{number}": stream for number, stream in enumerate(self.streams)}
        return {"calibration": self.calibration, "dense": self.dense, **own}


def sweep(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str],
    patterns: Sequence[str],
    densities: Sequence[float],
    calibration: Calibration | None = None,
    text: str | Path | None = None,
    windows: int | None = None,
    seqlen: int = 1024,
    device: str = "auto",
    dtype: str = "auto",
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: OnProgress = silent,
) -> SweepReport:
    """Perplexity of `model` pruned by every method in every pattern to every density; writes `out`/sweep.json.

    `densities` are kept shares, for patterns that do not fix their own. Cells that `out` holds already are not computed
    again, so more can be added; interrupted work goes on where it was, at most a minute before. Evaluates on `windows`
    windows of `seqlen` of `text` (default: the shipped held-out text). Raises InputError for bad input, also when `out`
    holds a sweep of another model, data or dtype (`fresh` discards it), and RunError when the work fails.
    """
    begin = time.monotonic()
    out, calibration = Path(out), calibration or Calibration()
    cells, skipped = plan_cells(methods, patterns, densities)
    source = resolve_model(
        str(model), trust_remote_code=trust_remote_code, report=lambda line: progress(Progress("model", 0, 1, line))
    )
    checkpoint = open_dense(source.path)
    where = resolve_device(device)
    walker = BlockWalker(checkpoint, where, compute_dtype(dtype, where, stored_dtype(checkpoint)))
    check_shapes(cells, walker.linear_shapes())
    check_context(walker.model.config, seqlen)
    tokenizer = load_tokenizer(source.path)
    tokens = tokenize(tokenizer, builtin_text("heldout") if text is None else read_text(text))
    bos = bos_token(tokenizer)
    evaluated = exact_windows(tokens, seqlen, bos, windows)
    calibrated = load_windows(calibration, tokenizer, source.path, walker.max_length).calibration
    identity = fingerprint(checkpoint, [*calibrated, *evaluated], str(walker.dtype), where.type, str(calibration.seed))

    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    held = None if fresh else _held(out / REPORT, identity)
    points = {} if held is None else {cell_of(point): point for point in held.points}
    missing = [cell for cell in cells if cell not in points]
    work = _Sweep(walker, calibrated, evaluated, calibration.seed, out / _STATE, identity, progress)
    if held is not None and not missing:
        return held.model_copy(update={"resumed_points": len(cells), "seconds": time.monotonic() - begin})
    if fresh:
        (out / _STATE).unlink(missing_ok=True)
    resumed_points, resumed_blocks = len(cells) - len(missing), 0
    for batch in _batches(missing, evaluated, walker):
        dense, found, resumed = work.walk(batch)
        resumed_blocks += resumed
        points |= found
        perplexity, standard_error = summarize(dense)
        report = SweepReport(
            model=source.name,
            dense_perplexity=perplexity,
            dense_standard_error=standard_error,
            points=list(points.values()),
            curves=curves_of(list(points.values())),
            skipped=skipped,
            text="builtin" if text is None else str(text),
            windows=len(evaluated),
            seqlen=seqlen,
            bos=bos is not None,
            calibration_data=calibration.data,
            calibration_samples=len(calibrated),
            calibration_seqlen=calibration.seqlen,
            seed=calibration.seed,
            dtype=str(walker.dtype).removeprefix("torch."),
            device=str(where),
            resumed_points=resumed_points,
            resumed_blocks=resumed_blocks,
            seconds=time.monotonic() - begin,
            versions={name: version(name) for name in ("torch", "transformers")},
        )
        write_text(out / REPORT, json.dumps({_IDENTITY: identity, **report.model_dump()}, indent=2) + "\n")
        (out / _STATE).unlink(missing_ok=True)
    return report


def cell_of(point: SweepPoint) -> Cell:
    """The cell a result is of."""
    return Cell(point.method, point.pattern, point.density)


def _held(file: Path, identity: str) -> SweepReport | None:
    """The earlier result in `file`, if there is one; raises InputError when it is of something else."""
    if not file.is_file():
        return None
    data = read_json(file)
    if data.pop(_IDENTITY, None) != identity:
        raise InputError(
            f"{file}: is a sweep of another model, text, calibration or dtype; choose another --out, or pass --fresh"
            " to replace it"
        )
    return SweepReport.model_validate(data)


def _batches(cells: Sequence[Cell], windows: Sequence[Tensor], walker: BlockWalker) -> list[list[Cell]]:
    """Cells to walk together, as many as their activations allow."""
    hidden = walker.model.config.get_text_config().hidden_size
    stream = sum(len(window) for window in windows) * hidden * walker.dtype.itemsize
    size = max(1, _STREAM_BYTES // stream)
    return [list(cells[start : start + size]) for start in range(0, len(cells), size)]


class _Sweep:
    """One walk through the model per batch of cells; what it needs to go on after an interruption is in `state`."""

    def __init__(
        self,
        walker: BlockWalker,
        calibration: list[Tensor],
        windows: list[Tensor],
        seed: int,
        state: Path,
        identity: str,
        progress: OnProgress,
    ) -> None:
        self.walker, self.calibration, self.windows = walker, calibration, windows
        self.seed, self.state, self.identity, self.progress = seed, state, identity, progress
        self.shapes = walker.linear_shapes()
        self.numbers = {name: number for number, name in enumerate(self.shapes)}

    def walk(self, cells: list[Cell]) -> tuple[list[Tensor], dict[Cell, SweepPoint], int]:
        """The dense model's losses per window, a point per cell, and how many blocks an earlier run had done."""
        walker = self.walker
        self.progress(Progress("embed", 0, 1))
        walk = self._start(cells)
        resumed, saved = walk.done, time.monotonic()
        densities = {cell: self._densities(cell) for cell in cells}
        for index in range(walk.done, walker.n_blocks):
            self.progress(Progress("sweep", index, walker.n_blocks, walker.block_prefix(index)))
            self._one_block(index, walk, densities)
            release_memory()
            if time.monotonic() - saved > _SAVE_SECONDS and index + 1 < walker.n_blocks:
                self._save(walk, index + 1)
                saved = time.monotonic()
        self.progress(Progress("sweep", walker.n_blocks, walker.n_blocks))
        dense = walker.losses(self._split(walk.dense, self.windows), self.windows)
        points = {}
        for number, cell in enumerate(cells):
            self.progress(Progress("eval", number, len(cells), str(cell)))
            losses = walker.losses(self._split(walk.streams[number], self.windows), self.windows)
            points[cell] = _point(cell, losses, dense)
        self.progress(Progress("eval", len(cells), len(cells)))
        return dense, points, resumed

    def _densities(self, cell: Cell) -> dict[str, float]:
        """What each linear keeps."""
        if cell.method == "erk-random":
            return erk_densities(self.shapes, cell.density)
        return dict.fromkeys(self.shapes, cell.density)

    def _split(self, stream: Tensor, windows: Sequence[Tensor]) -> list[Tensor]:
        return list(stream.split(batch_size(len(windows[0]))))

    def _one_block(self, index: int, walk: _Walk, densities: dict[Cell, dict[str, float]]) -> None:
        """Collect statistics on the dense inputs, then prune block `index` for every cell and send its stream on."""
        walker = self.walker
        with walker.block(index) as block:
            linears = walker.block_linears(index)
            first, *others = self._split(walk.dense, self.windows)
            groups = input_groups(linears, lambda: self._propagate(index, block, [first]))
            self._propagate(index, block, others)
            hessian = any(cell.needs_hessian for cell in walk.cells)
            statistics = {
                group[0]: InputStatistics(linears[group[0]].in_features, hessian, walker.device) for group in groups
            }
            with _collecting(statistics, linears):
                self._propagate(index, block, self._split(walk.calibration, self.calibration))
            owner = {name: statistics[group[0]] for group in groups for name in group}
            dense = {name: linear.weight for name, linear in linears.items()}
            for number, cell in enumerate(walk.cells):
                self.progress(Progress("sweep", index, walker.n_blocks, f"{walker.block_prefix(index)} {cell}"))
                for name, linear in linears.items():
                    pruned = self._prune(cell, name, dense[name], owner[name], densities[cell][name])
                    linear.weight = nn.Parameter(pruned, requires_grad=False)
                self._propagate(index, block, self._split(walk.streams[number], self.windows))

    @torch.no_grad()
    def _prune(self, cell: Cell, name: str, weight: Tensor, statistics: InputStatistics, density: float) -> Tensor:
        """The weight of linear `name` in `cell`, in the compute dtype; raises RunError, naming both."""
        statistics.require_usable(name)
        # A draw of its own for every linear, whatever else is in the sweep.
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.numbers[name])
        try:
            return prune(cell, weight.float(), statistics, density, generator).to(weight.dtype)
        except HessianError as unusable:
            raise RunError(f"{name}: {cell}: {unusable}") from None

    def _propagate(self, index: int, block: nn.Module, stream: list[Tensor]) -> None:
        for x in stream:
            x.copy_(self.walker.run(index, block, x))

    def _start(self, cells: list[Cell]) -> _Walk:
        """Where an interrupted walk of the same cells was, or the embedded inputs."""
        walker = self.walker
        calibration = torch.cat(walker.embed(self.calibration))
        dense = torch.cat(walker.embed(self.windows))
        return self._saved(cells) or _Walk(cells, calibration, dense, [dense.clone() for _ in cells])

    def _saved(self, cells: list[Cell]) -> _Walk | None:
        """The walk that an interrupted run of the same cells left, if it did."""
        if not self.state.is_file():
            return None
        try:
            with safe_open(self.state, framework="pt", device=str(self.walker.device)) as file:
                about = file.metadata()
                if {**about, "done": ""} != {**self._about(cells), "done": ""}:
                    return None
                streams = [file.get_tensor(f"cell.{number}") for number in range(len(cells))]
                return _Walk(
                    cells, file.get_tensor("calibration"), file.get_tensor("dense"), streams, int(about["done"])
                )
        except (OSError, SafetensorError):
            return None  # damaged: done again

    def _save(self, walk: _Walk, done: int) -> None:
        """Make the walk after `done` blocks durable."""
        temporary = self.state.with_name(self.state.name + ".tmp")
        with disk_errors(self.state):
            save_file(walk.tensors(), temporary, {**self._about(walk.cells), "done": str(done)})
            commit(temporary, self.state)

    def _about(self, cells: Sequence[Cell]) -> dict[str, str]:
        return {_IDENTITY: self.identity, "cells": ", ".join(map(str, cells))}


@contextmanager
def _collecting(statistics: dict[str, InputStatistics], linears: dict[str, nn.Linear]) -> Iterator[None]:
    """Within the `with`, calls of the linears named in `statistics` add their inputs to those."""

    def hook(into: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: into.add(args[0])

    handles = [linears[name].register_forward_pre_hook(hook(own)) for name, own in statistics.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _point(cell: Cell, losses: list[Tensor], dense: list[Tensor]) -> SweepPoint:
    """A cell's perplexity, and its ratio to the dense one with the paired standard error."""
    mean, error = mean_and_error([float((a - b).mean()) for a, b in zip(losses, dense, strict=True)])
    ratio = _exp(mean)
    return SweepPoint(
        method=cell.method,
        pattern=cell.pattern,
        density=cell.density,
        perplexity=_exp(float(torch.cat(losses).double().mean())),
        ratio=ratio,
        ratio_standard_error=None if error is None else ratio * error,
    )


def _exp(x: float) -> float:
    """e^x, at most e^700: a ruined model's loss may be beyond any float, or no number at all."""
    return math.exp(x) if x < 700 else math.exp(700)
