"""The work on a model: block after block, then the whole of it, then its reloaded self."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..eval.selection import dense_tokens_of, prompt_tokens_of, selecting_tokens
from ..serving.checkpoint import Checkpoint
from ..serving.errors import RunError
from ..serving.experts import stack_of
from ..serving.linear import SelectingLinear, core_inputs, expand_linears, read_all_at_first
from ..serving.storage import effective_weight, selection_of
from ..serving.tables import Table
from . import vocabulary, writer
from .allocation import allocate, selecting_linears, with_sparsities
from .blocks import BlockWalker
from .calibration import Windows
from .journal import Journal
from .lockstep import Forward, Pass, PausingPass, RestartingPass, input_groups, pauses
from .memory import memory_errors, release_memory
from .passes import StageConfig, needs_of
from .recipe import Recipe
from .report import (
    LayerReport,
    OnProgress,
    Progress,
    TableReport,
    TuningReport,
    Verification,
)
from .sensitivity import GRADIENT_BATCHES, input_sensitivities
from .solve import Solved, replace_linear, solve_linear
from .statistics import InputStatistics
from .streams import Stream
from .tuning.block import Pairs, tune_block
from .tuning.metric import remembered
from .tuning.thresholds import has_threshold, meet_shares, shares_read
from .tuning.weights import stored_tensors, trainable_weights
from .tuning.whole import Job, remember_teacher, tune_whole
from .world import ALONE, World

# Reloaded outputs must match the run's own up to the compute dtype's rounding.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Run:
    """State that moves from block to block: the activation streams, and what has been reported so far."""

    def __init__(
        self,
        walker: BlockWalker,
        stages: dict[str, StageConfig],
        recipe: Recipe,
        windows: Windows,
        journal: Journal,
        progress: OnProgress,
        world: World = ALONE,
        spill: bool = False,
    ) -> None:
        """`windows` are this process's share of them, in `world`. With `spill`, activations are in the journal's
        folder, one batch at a time in memory."""
        self.walker, self.stages, self.embeddings, self.windows = walker, stages, recipe.embeddings, windows
        self.tuning, self.seed = recipe.tuning, recipe.calibration.seed
        self.dense_tokens = dense_tokens_of(recipe.calibration.seqlen)
        self.journal, self.progress, self.world, self.spill = journal, progress, world, spill
        self.hidden = Stream()  # calibration activations of the compressed model ...
        self.more = Stream()  # ... and those of further windows to tune on
        self.dense = Stream()  # both of the dense model, when there is something to tune
        self.dev = Stream()  # dev-set activations of the compressed model ...
        self.dev_dense = Stream()  # ... and of the dense one
        self.tensors = walker.stored()
        self.layers: list[LayerReport] = []
        self.tables: list[TableReport] = []
        self.tuned: list[TuningReport] = []

    def all_blocks(self) -> int:
        """Embed, then take every block through its work; returns how many were resumed from the journal."""
        walker = self.walker
        self.progress(Progress("embed", 0, 1))
        table = self._quantized_embedding()
        self.hidden = self._embed(walker, self.windows.calibration, table)
        self.dev = self._embed(walker, self.windows.dev, table)
        copied = table is None
        self.dev_dense = self._stream(x.clone() for x in self.dev) if copied else self._embed(walker, self.windows.dev)
        if self.tuning is not None:
            if self.tuning.block is not None:
                self.more = self._embed(walker, self.windows.tuning, table)
            self.dense = self._embed(walker, self.windows.calibration) + self._embed(walker, self.windows.tuning)
        release_memory()
        resumed = 0
        for index in range(walker.n_blocks):
            with memory_errors(walker.block_prefix(index)):
                resumed += self._one_block(index)
            release_memory()
        self.hidden, self.more = Stream(), Stream()  # what follows needs the memory
        return resumed

    def _stream(self, batches: Iterable[Tensor]) -> Stream:
        return Stream.in_file(batches, self.journal.folder) if self.spill else Stream(batches)

    def _passes(self, run: Forward, stream: Stream) -> list[Pass]:
        if self.spill:
            return [RestartingPass(run, partial(stream.__getitem__, number)) for number in range(len(stream))]
        return [PausingPass(run, x) for x in stream]

    def _embed(self, walker: BlockWalker, windows: list[Tensor], table: Table | None = None) -> Stream:
        return self._stream((walker.embedded if self.spill else walker.embed)(windows, table))

    def _quantized_embedding(self) -> Table | None:
        """Quantize the embedding and the head, or take them from the journal, when the recipe says so."""
        if self.embeddings is None:
            return None
        part, tables = vocabulary.PART, self.walker.tables()
        entry = self.journal.done(part)
        if entry is None:
            self.progress(Progress("embed", 0, 1, f"rounding to {self.embeddings.numbers}"))
            mine = tables.values() if self.world.leads else ()
            reports, packed = vocabulary.quantize_tables(mine, self.embeddings, self.walker.device)
            self.journal.store(part, packed, tables=[report.model_dump() for report in reports])
            entry = self.journal.entries[-1]
        self.tables = [TableReport.model_validate(report) for report in entry["tables"]]
        return self._quantized(tables[self.walker.embedding])

    def _quantized(self, table: Table) -> Table | None:
        """The journal's form of a dense embedding or head; None when the recipe leaves it dense."""
        if self.embeddings is None:
            return None
        return vocabulary.quantized(table, self.embeddings, self.journal.folder / vocabulary.PART)

    def _one_block(self, index: int) -> bool:
        """Solve block `index`, or take it from the journal; every stream becomes the block's outputs on it."""
        walker, part = self.walker, part_name(index)
        self.progress(Progress("blocks", index, walker.n_blocks, walker.block_prefix(index)))
        with walker.block(index) as block:
            linears = selecting_linears(walker, index, self.stages, self.dense_tokens)
            first, others = self.dev_dense[:1], self.dev_dense[1:]  # none, where processes outnumber dev windows
            groups = input_groups(linears, lambda: self._propagate(index, block, first)) if first else []
            groups = self.world.shared(groups)
            self._propagate(index, block, others + self.dense)
            entry = self.journal.done(part)
            resumed = entry is not None
            if entry is not None:
                self.stages.update(with_sparsities(self.stages, entry.get("sparsities", {})))
                self._fill(index, block, writer.read_part(self.journal.folder / part))
            else:
                # One batch tells the linears of a block apart.
                run, first = partial(walker.run, index, block), self.hidden[:1]
                found = allocate(run, linears, self.stages, first) if self.world.leads else {}
                sparsities = self.world.shared(found)
                self.stages.update(with_sparsities(self.stages, sparsities))
                sensitivities = self._sensitivities(index, block, linears)
                dense = {name: linear.weight for name, linear in linears.items() if self._tunes_blocks}
                layers, packed = self._solve(index, block, linears, groups, sensitivities)
                tuned = self._tune(index, block, packed, dense)
                del dense, sensitivities
                self.journal.store(
                    part,
                    packed,
                    layers=[layer.model_dump() for layer in layers],
                    tuning=[row.model_dump() for row in tuned],
                    sparsities=sparsities,
                )
                del packed
            if resumed or self._tunes_blocks:
                self._propagate(index, block, self.hidden + self.more + self.dev)
            entry = self.journal.done(part) or {}
            self.layers += [LayerReport.model_validate(layer) for layer in entry["layers"]]
            self.tuned += [TuningReport.model_validate(report) for report in entry["tuning"]]
        self.progress(Progress("blocks", index + 1, walker.n_blocks, walker.block_prefix(index)))
        return resumed

    def _sensitivities(self, index: int, block: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """How much the inputs of the linears that are selected by gradient move the output of the dense block."""
        chosen = {name: linear for name, linear in linears.items() if self.stages[name].needs_gradients}
        if not chosen:
            return {}
        run = partial(self.walker.call, index, block, weights={})
        found = input_sensitivities(run, chosen, self.hidden[:GRADIENT_BATCHES], self.seed)
        for name, sensitivity in found.items():
            if not bool(torch.isfinite(sensitivity).all()):
                raise RunError(f"{name}: the gradients through it are not finite; try --dtype float32, or score: l2")
        return found

    @property
    def _tunes_blocks(self) -> bool:
        return self.tuning is not None and self.tuning.block is not None

    def _tune(
        self, index: int, block: nn.Module, packed: dict[str, Tensor], dense: Mapping[str, Tensor]
    ) -> list[TuningReport]:
        """Train the solved block, whose weights were `dense`, when the recipe says so; `packed` and the block then hold
        the result."""
        if self.tuning is None or self.tuning.block is None:
            return []
        walker, prefix, settings = self.walker, self.walker.block_prefix(index), self.tuning.block
        weights = trainable_weights(block, prefix, self.stages, packed, self.tensors, settings.train, dense)
        train = Pairs(self.hidden + self.more, self.dense)
        dev = Pairs(self.dev, self.dev_dense)
        report = tune_block(
            walker,
            index,
            block,
            weights,
            train,
            dev,
            remembered(self.journal, prefix).to(walker.device),
            settings,
            seed=self.seed,
            say=lambda text: self.progress(Progress("blocks", index, walker.n_blocks, f"{prefix} {text}")),
        )
        if report.note is None and report.best_step > 0:
            packed.update(stored_tensors(weights, prefix, packed))
            self._fill(index, block, packed)
        release_memory()
        return [report]

    def _propagate(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Replace the block's inputs in `stream` by its outputs."""
        for number, x in enumerate(stream):
            stream.store(number, self.walker.run(index, block, x))

    @torch.no_grad()
    def _solve(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, nn.Linear],
        groups: list[list[str]],
        sensitivities: Mapping[str, Tensor],
    ) -> tuple[list[LayerReport], dict[str, Tensor]]:
        """Solve and replace the block's linears, group by group, on the compressed stream, and propagate that stream.

        Also returns what the checkpoint will store for them, by full tensor name.
        """
        walker, prefix = self.walker, self.walker.block_prefix(index)
        layers: list[LayerReport] = []
        packed: dict[str, Tensor] = {}

        # Not `walker.run`: a pass that is dropped half-way would restore the grad mode it found, whenever that happens.
        run = partial(walker.call, index, block, weights={})
        calibration, dev = self._passes(run, self.hidden), self._passes(run, self.dev)
        with pauses({group[0]: linears[group[0]] for group in groups}):
            for group in groups:
                hessian = any(needs_of(self.stages[name]) == "hessian" for name in group)
                statistics = InputStatistics(linears[group[0]].in_features, hessian, walker.device)
                # Passes that pause hold these tensors themselves.
                seen, unseen = (self._stream(f.run_to(group[0]) for f in passes) for passes in (calibration, dev))
                statistics.collect(seen, self.world)
                routed: dict[str, float] = {}
                if stack_of(group[0]) is not None:
                    routed = {"tokens": statistics.tokens, "by_magnitude": statistics.lean_on_magnitudes()}
                release_memory()  # the solvers need other sizes than the forward passes left behind
                for together in self.world.rounds(group):
                    solved = [Solved.nothing() for _ in together]
                    for name in together[self.world.rank :][:1]:
                        stored = self.tensors[f"{name}.weight"].dtype
                        solved[self.world.rank] = solve_linear(
                            name, linears[name], self.stages[name], stored, statistics
                        )
                    for source, name in enumerate(together):
                        linear, stage, stored = linears[name], self.stages[name], self.tensors[f"{name}.weight"].dtype
                        found = solved[source].shared(self.world, source, walker.device)
                        layer, tensors = replace_linear(
                            name, linear, stage, stored, found, seen, unseen, sensitivities.get(name), self.world
                        )
                        layers.append(layer.model_copy(update={"stats": {**layer.stats, **routed}}))
                        packed.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
                        done = f"{name.removeprefix(prefix + '.')} {layer.errors}"
                        self.progress(Progress("blocks", index, walker.n_blocks, f"{prefix} {done}"))
                del statistics, seen, unseen
                release_memory()  # and the other way round
            # Nobody calibrates on the last block's outputs, and a block to be tuned needs its inputs once more.
            last = index + 1 == walker.n_blocks
            unfinished = [(dev, self.dev)] if last else [(calibration, self.hidden), (dev, self.dev)]
            for passes, stream in [] if self._tunes_blocks else unfinished:
                for number, forward in enumerate(passes):
                    stream.store(number, forward.finish())
        return layers, packed

    def whole(self, identity: str) -> list[str]:
        """Train the whole model when the recipe says so; returns the names of the parts that make the checkpoint."""
        blocks = [part_name(index) for index in range(self.walker.n_blocks)]
        others = [] if self.embeddings is None else [vocabulary.PART]
        if self.tuning is None:
            return [*others, *blocks]
        if self.tuning.end_to_end is None:
            return [*others, *self._with_shares_met(blocks)]
        tables = {name: self._quantized(table) for name, table in self.walker.tables().items()}
        job = Job(
            walker=self.walker,
            stages=self.stages,
            settings=self.tuning.end_to_end,
            windows=self.windows,
            journal=self.journal,
            tensors=self.tensors,
            blocks=blocks,
            embedding=tables[self.walker.embedding],
            head=tables[self.walker.head_table],
            run=identity,
            seed=self.seed,
        )

        def say(done: int, total: int, text: str) -> None:
            self.progress(Progress("end_to_end", done, total, text))

        remember_teacher(job, self.dense, self.dev_dense, say)
        self.dense = Stream()
        release_memory()
        tuned = tune_whole(job, say)
        self.dev = Stream(tuned.dev)
        self.tuned.append(tuned.report)
        return [*others, *self._with_shares_met(tuned.parts)]

    def _with_shares_met(self, parts: list[str]) -> list[str]:
        """The names of a tuned model's parts in which tokens read the shares that the stages allow; `parts` are those
        of its blocks as training left them."""
        if not any(map(has_threshold, self.stages.values())):
            return parts
        walker, names = self.walker, [f"met-{part}" for part in parts]
        read: dict[str, float] = {}
        table = None if self.embeddings is None else self._quantized(walker.tables()[walker.embedding])
        hidden, self.dev = (self._embed(walker, text, table) for text in (self.windows.calibration, self.windows.dev))
        for index, (part, name) in enumerate(zip(parts, names, strict=True)):
            self.progress(Progress("shares", index, walker.n_blocks, walker.block_prefix(index)))
            with memory_errors(walker.block_prefix(index)):
                read |= self._meet_shares(index, part, name, hidden)
            release_memory()
        for number, layer in enumerate(self.layers):
            if layer.name in read:
                stats = layer.stats | {"inputs_read": read[layer.name]}
                self.layers[number] = layer.model_copy(update={"stats": stats})
        return names

    def _meet_shares(self, index: int, part: str, name: str, hidden: Stream) -> dict[str, float]:
        """Store the tuned `part` of block `index` with other thresholds as `name`, unless that is done; the calibration
        activations `hidden` and those of the dev set move on. The shares that linears read on the latter are returned.
        """
        entry = self.journal.done(name)
        tensors = writer.read_part(self.journal.folder / (part if entry is None else name))
        with self.walker.block(index) as block:
            linears = selecting_linears(self.walker, index, self.stages, self.dense_tokens)
            self._fill(index, block, tensors)
            if entry is None:
                run = partial(self.walker.run, index, block)
                chosen = {
                    linear_name: linear
                    for linear_name, linear in linears.items()
                    if isinstance(linear, SelectingLinear) and has_threshold(self.stages[linear_name])
                }
                tensors |= meet_shares(run, chosen, self.stages, hidden)
                self.journal.store(name, tensors, read=shares_read(run, chosen, self.dev))
            self._propagate(index, block, hidden + self.dev)
        found: dict[str, float] = (self.journal.done(name) or {})["read"]
        return found

    def _fill(self, index: int, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Give the dense block the weights that the stored `tensors` (by full name) stand for."""
        rest = dict(tensors)
        for name, linear in self.walker.block_linears(index).items():
            if name in self.stages:
                suffixes = {key[len(name) + 1 :]: rest.pop(key) for key in tensors if key.startswith(name + ".")}
                shape = (linear.out_features, linear.in_features)
                scheme, device = self.stages[name].scheme(shape), linear.weight.device
                weight = effective_weight(scheme, suffixes, shape, linear.weight.dtype)
                linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
                if isinstance(linear, SelectingLinear):
                    linear.selection = selection_of(scheme, {key: part.to(device) for key, part in suffixes.items()})
        for name, tensor in rest.items():
            block.get_parameter(name[len(self.walker.block_prefix(index)) + 1 :]).copy_(tensor)

    def verify(self, folder: Path) -> tuple[Verification, list[Tensor]]:
        """Reload the artifact, run it block by block on the dev windows, compare with this run; returns its losses too,
        those of this process's windows.

        Raises RunError on a mismatch.
        """
        reloaded = BlockWalker(Checkpoint(folder), self.walker.device, self.walker.dtype)
        stream = self._embed(reloaded, self.windows.dev)
        for index in range(reloaded.n_blocks):
            with reloaded.block(index) as block:
                read_all_at_first(block, self.dense_tokens)
                if self.walker.dtype not in _TOLERANCE or core_inputs(block):
                    # In 16 bits the run multiplies effective weights rounded to the dtype; kernels and branches do not
                    # round them, and over many blocks that adds up to more than a damaged tensor might. And in the run
                    # every token chooses its own inputs, where in use a prompt does.
                    expand_linears(block, self.walker.dtype)
                for number, x in enumerate(stream):
                    stream.store(number, reloaded.run(index, block, x))
            release_memory()
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(stream, self.dev, strict=True)]
        difference = max(found for part in self.world.gathered(apart) for found in part)
        tolerance = _TOLERANCE.get(self.walker.dtype, 1e-3)
        if not difference <= tolerance:
            if self.world.leads:
                (folder / writer.JOURNAL).write_text("")  # these parts must not be resumed
            raise RunError(
                f"{folder}: the reloaded checkpoint's outputs differ by {difference:.2e} (relative RMS, allowed"
                f" {tolerance:.0e}); the artifact was not published, please report this"
            )
        losses = [loss.cpu() for loss in reloaded.losses(stream, self.windows.dev)]
        return Verification(relative_difference=difference, tolerance=tolerance), losses

    def losses_behind_prompts(self, folder: Path) -> list[Tensor]:
        """The artifact's losses of this process's dev windows, whose first tokens are prompts that choose the inputs of
        the others, as in `eval`; those of the prompts are among them."""
        windows, reloaded = self.windows.dev, BlockWalker(Checkpoint(folder), self.walker.device, self.walker.dtype)
        if not windows:
            return []
        rows = self._stream(row[None] for x in self._embed(reloaded, windows) for row in x)
        reloaded.learn(1, len(windows[0]))  # a prompt chooses for itself
        for index in range(reloaded.n_blocks):
            with reloaded.block(index) as block, selecting_tokens(block, prompt_tokens_of(len(windows[0]))):
                for number, x in enumerate(rows):
                    rows.store(number, reloaded.run(index, block, x))
            release_memory()
        return [loss.cpu() for loss in reloaded.losses(rows, windows)]


def part_name(index: int) -> str:
    """File name of block `index`'s finished part in the work folder."""
    return f"block-{index:05d}.safetensors"
