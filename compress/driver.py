"""The one way through a compression: resolve the recipe, do the work (`run.py`), assemble, verify, report, publish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..eval.perplexity import summarize
from ..eval.selection import prompt_tokens_of
from ..serving.checkpoint import Checkpoint, read_header
from ..serving.durable import write_text
from ..serving.errors import InputError, RunError
from ..serving.experts import disk_name, stack_of
from ..serving.inspect import inspect_checkpoint
from ..serving.integrity import not_finite, write_sums
from ..serving.load import load_tokenizer, resolve_device, stored_dtype
from ..serving.scheme import ArtifactConfig
from ..serving.sources import resolve_model
from . import basis, provenance, vocabulary, writer
from .allocation import with_sparsities
from .blocks import BlockWalker, compute_dtype, open_dense
from .calibration import Windows, load_windows, shared_windows
from .fisher import allocate_by_fisher
from .journal import Journal, clear_scaffold, fingerprint, tokens_hash
from .memory import memory_errors, peak_rss_gb, release_memory
from .passes import StageConfig
from .recipe import Recipe
from .report import (
    CompressionReport,
    DevPerplexity,
    OnProgress,
    Progress,
    silent,
)
from .run import Run
from .search.run import search, space_of
from .streams import activation_bytes, check_budget, spilled_bytes
from .tuning.metric import remember_metrics
from .world import ALONE, World

_ALLOCATION = "allocation"  # notes about it in the journal


def compress_checkpoint(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    activation_memory: float | None = None,
    progress: OnProgress = silent,
    world: World = ALONE,
) -> CompressionReport:
    """Compress `model` by `recipe` into the new checkpoint folder `out`, verify it by reloading, and report.

    `model` is a folder, a hub id, a GGUF file or `demo`; `recipe` a Recipe, a file or a shipped name. Blocks are
    computed in `dtype` on `device` and stored in the checkpoint's own dtype. Memory stays at a block or two, the
    embeddings and the calibration activations. Interrupted work stays in `OUT.partial`, and the same call resumes it;
    `fresh` discards it. The processes of `world` share the work (docs/distributed.md): all of them call this alike, its
    leader alone writes, reads the calibration text and shows progress, all return the report. Raises InputError for bad
    input and RunError when the work fails; `out` appears only when everything succeeded.

    Where the activations of a process (`activation_bytes`: the streams of calibration, dev and tuning windows, and what
    paused passes hold of them) would need more than `activation_memory`, in 10^9 bytes, all of them are in nameless
    files in `OUT.partial`, and about one batch at a time in memory, on the host or the device. Passes then start over
    for every input of a block instead of pausing: the result has the same bytes and takes longer, with hundreds of
    experts in a block much longer. Not covered: the outputs on the dev set (one window per 16) while its perplexity is
    computed, gradients, and what end-to-end tuning and `search` hold.
    """
    begin = time.monotonic()
    out = Path(out)
    check_budget(activation_memory)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    _require_shareable(recipe, world)
    progress = _noting(progress, world)
    source = world.in_turns(
        lambda: resolve_model(
            str(model),
            trust_remote_code=trust_remote_code,
            report=lambda text: progress(Progress("model", 0, 1, text)),
        )
    )
    checkpoint = open_dense(source.path)
    _require_same(checkpoint, world)
    where = world.local(resolve_device(device))
    walker = BlockWalker(checkpoint, where, compute_dtype(dtype, where, stored_dtype(checkpoint)))
    shapes = walker.linear_shapes()
    stages = recipe.resolve(shapes)
    if recipe.search is not None:
        space_of(walker, recipe.search, stages)  # whether it can search
    _check_experts(recipe, stages, shapes)
    sizes = (recipe, shapes, walker.model.config.get_text_config().hidden_size, walker.dtype.itemsize)
    spill = activation_memory is not None and activation_bytes(*sizes) / world.size > activation_memory * 1e9
    spilled = spilled_bytes(*sizes) if spill else 0.0
    if recipe.embeddings is not None:
        vocabulary.check_supported(checkpoint, recipe.embeddings)
    if world.leads:
        clear_scaffold(out)  # in case that a run was killed right after it had published
    with _work_folder(out, overwrite, world) as work:
        windows = shared_windows(world, partial(_load, checkpoint, recipe, walker, work, spilled))
        release_memory()
        selections = [stage.selection for stage in stages.values() if stage.selection is not None]
        if any(selection.threshold == "prompt" for selection in selections) and len(windows.dev[0]) < 3:
            raise InputError("threshold: prompt needs windows of 3 tokens or more, a prompt and what follows it")
        settings = (recipe.to_yaml(), str(walker.dtype), where.type)
        tokens = [*windows.all, *windows.dev, *windows.search]
        identity = world.shared(fingerprint(checkpoint, tokens, *settings))
        journal = Journal(work, identity, fresh, world)
        if recipe.basis is not None:
            say = _counting(progress, "basis", basis.steps(walker, recipe.basis))
            basis.change_basis(walker, recipe.basis, stages, windows.calibration, journal, say)
            release_memory()
        stages |= with_sparsities(stages, _allocated(walker, stages, windows, recipe, journal, progress))
        searched = None
        if recipe.search is not None:
            space = space_of(walker, recipe.search, stages)
            searched = search(walker, recipe, space, stages, windows, journal, progress)
            recipe = searched.recipe
            stages = recipe.resolve(shapes)
            release_memory()
        if recipe.tuning is not None and recipe.tuning.block is not None:
            say = _counting(progress, "metric", 2 * walker.n_blocks + 1)
            with memory_errors("weighing the errors of blocks"):
                remember_metrics(walker, windows.calibration, journal, recipe.calibration.seed, say)
            release_memory()
        run = Run(walker, stages, recipe, windows.share(world), journal, progress, world, spill)
        resumed = run.all_blocks()
        parts = run.whole(identity)

        schemes = {name: stage.scheme(shapes[name]) for name, stage in run.stages.items()}
        selects = any(scheme.selection is not None for scheme in schemes.values())
        scheme = ArtifactConfig(linears=schemes, prefill=recipe.prefill if selects else "masked")
        if recipe.embeddings is not None:
            integers = recipe.embeddings.integers()
            heads = {table.name: integers.dense for table in run.tables if table.name != walker.embedding}
            scheme = scheme.model_copy(update={"linears": {**scheme.linears, **heads}, "embedding": integers})
        if world.leads:
            _assemble(work, walker, scheme, recipe, parts)
        world.meet()
        release_memory()
        progress(Progress("verify", 0, 1))
        _require_finite(checkpoint, run.dev_dense + run.dev)
        verification, compressed_losses = run.verify(work)
        dense_losses = walker.losses(run.dev_dense, run.windows.dev)
        if scheme.prompt_static:
            prompt = prompt_tokens_of(len(windows.dev[0]))
            dense_losses = [loss[prompt:] for loss in dense_losses]
            compressed_losses = [loss[prompt:] for loss in run.losses_behind_prompts(work)]
        _require_finite(checkpoint, [*dense_losses, *compressed_losses])
        losses = _by_window(dense_losses, world), _by_window(compressed_losses, world)
        calibrated, memory = world.gathered(len(run.windows.calibration)), world.gathered(peak_rss_gb())
        if not world.leads:
            return CompressionReport.model_validate(world.shared({}))
        inspection = inspect_checkpoint(work)
        report = CompressionReport(
            model=source.name,
            note=source.note,
            recipe=recipe.name,
            out=str(out),
            seconds=time.monotonic() - begin,
            peak_rss_gb=max(memory),
            blocks=walker.n_blocks,
            blocks_resumed=resumed,
            effective_bits=inspection.effective_bits,
            effective_bits_model=inspection.effective_bits_model,
            linear_bytes_ratio=inspection.linear_bytes_ratio,
            bytes=inspection.bytes,
            calibration_data=recipe.calibration.data,
            calibration_tokens=sum(len(window) for window in windows.calibration),
            windows_sha256=tokens_hash(windows.calibration),
            seed=recipe.calibration.seed,
            dtype=str(walker.dtype).removeprefix("torch."),
            device=str(where),
            dev=DevPerplexity(
                dense=summarize(losses[0])[0],
                compressed=summarize(losses[1])[0],
                tokens=sum(len(loss) for loss in losses[0]),
                windows=len(windows.dev),
                seqlen=len(windows.dev[0]),
            ),
            verification=verification,
            layers=run.layers,
            tables=run.tables,
            tuning=run.tuned,
            searched=None if searched is None else searched.report,
            search=[] if searched is None else searched.trials,
            versions=provenance.versions(),
            provenance=provenance.of_run(checkpoint, windows),
            processes=world.size,
            windows_by_process=calibrated,
        )
        if fingerprint(checkpoint, tokens, *settings) != identity:
            raise RunError(f"{source.path}: the model's files changed during the run; run it again with --fresh")
        write_text(work / "report.json", report.model_dump_json(indent=2) + "\n")
        write_sums(work, without=[*journal.parts, writer.JOURNAL])
        writer.publish(work, out)
        clear_scaffold(out)
        progress(Progress("verify", 1, 1))
        world.shared(report.model_dump())
        return report


def _allocated(
    walker: BlockWalker,
    stages: Mapping[str, StageConfig],
    windows: Windows,
    recipe: Recipe,
    journal: Journal,
    progress: OnProgress,
) -> dict[str, float]:
    """What `allocate_by_fisher` gives linears; found once in a run, by the leader of its processes."""
    if not any(stage.shares_by_fisher for stage in stages.values()):
        return {}
    if not journal.notes(_ALLOCATION):
        say = _counting(progress, "allocate", 2 * walker.n_blocks + 1)
        leads = journal.world.leads
        found = allocate_by_fisher(walker, stages, windows.calibration, recipe.calibration.seed, say) if leads else {}
        journal.note(_ALLOCATION, found)
        release_memory()
    return dict(journal.notes(_ALLOCATION)[0])


def _counting(progress: OnProgress, stage: str, total: int) -> Callable[[str], None]:
    """What shows the texts it is told as the steps of `stage`, of which there are `total`."""
    done = count(1)
    return lambda text: progress(Progress(stage, next(done), total, text))


_DOING = {
    "model": "the model was being fetched",
    "embed": "calibration text was being embedded",
    "basis": "the basis was being changed",
    "allocate": "bytes were being divided between the blocks",
    "shares": "the thresholds of the tuned model were being set",
    "metric": "what errors of the blocks cost was being found",
    "verify": "the artifact was being verified",
}


def _noting(progress: OnProgress, world: World) -> OnProgress:
    """`progress` for the leader, none for others; either way `world` knows what the run is at."""

    def note(step: Progress) -> None:
        if step.stage == "blocks" and step.done < step.total:
            world.doing = f"block {step.done} was being solved"
        else:
            world.doing = _DOING.get(step.stage, "the artifact was being written")
        if world.leads:
            progress(step)

    return note


def _require_shareable(recipe: Recipe, world: World) -> None:
    """Raise InputError for what several processes cannot do together."""
    if world.size > 1 and recipe.tuning is not None:
        raise InputError(
            f"recipe {recipe.name}: tuning does not spread over {world.size} processes; add --tuning none, or run it"
            " without torchrun"
        )
    if world.size > 1 and recipe.search is not None:
        raise InputError(f"recipe {recipe.name}: search does not spread over {world.size} processes; run it alone")


def _require_same(checkpoint: Checkpoint, world: World) -> None:
    """Raise InputError unless all processes see the same model, be it in copies of their own."""
    seen = hashlib.sha256(checkpoint.stamp(times=False).encode()).hexdigest()
    if world.shared(seen) != seen:
        raise InputError(
            f"{checkpoint.path}: is another model than rank 0 has there; copy it anew, or share the folder"
        )


def _load(checkpoint: Checkpoint, recipe: Recipe, walker: BlockWalker, work: Path, spilled: float) -> Windows:
    """All windows that `recipe` asks for, once there is room for what will be written into `work`, `spilled` bytes of
    activations among it."""
    with writer.no_empty_leftover(work):
        parts = sum(info.nbytes for info in checkpoint.tensors.values())
        writer.require_space(work, (2 if recipe.basis is None else 3) * parts + int(spilled))
        return load_windows(
            recipe.calibration,
            load_tokenizer(checkpoint.path),
            checkpoint.path,
            walker.max_length,
            tuning=0 if recipe.tuning is None else recipe.tuning.samples or 0,
            search=recipe.search,
        )


@contextmanager
def _work_folder(out: Path, overwrite: bool, world: World) -> Iterator[Path]:
    """The work folder of `out`, which the leader prepares and holds."""
    with ExitStack() as held:
        partial = writer.prepare(out, overwrite) if world.leads else out
        if world.leads:
            held.enter_context(writer.alone_in(partial))
        yield Path(world.shared(str(partial)))


def _by_window(losses: list[Tensor], world: World) -> list[Tensor]:
    """The losses `[T - 1]` of all windows, from everybody's share of them."""
    return [torch.tensor(loss) for part in world.gathered([loss.tolist() for loss in losses]) for loss in part]


def _check_experts(recipe: Recipe, stages: Mapping[str, StageConfig], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError for what cannot be done to a mixture of experts, or not stored for one."""
    stacks = {name: stack for name in shapes if (stack := stack_of(name)) is not None}
    done = {stack for name, stack in stacks.items() if name in stages}
    if done and recipe.tuning is not None:
        raise InputError(f"recipe {recipe.name}: experts cannot be tuned yet; pass --tuning none")
    for name, stack in stacks.items():
        if stack in done and name not in stages:
            raise InputError(f"recipe {recipe.name}: leaves {name} dense, but not all of {stack}; ignore all or none")
        if name in stages and stages[name].selection is not None:
            raise InputError(f"recipe {recipe.name}: {name} is of an expert, which cannot select its inputs yet")
        if name in stages and stages[name].scheme(shapes[name]).storage == "dense":
            raise InputError(
                f"recipe {recipe.name}: {name} is of an expert, and pattern {stages[name].structure} has no packed form"
            )


def _require_finite(checkpoint: Checkpoint, outputs: Iterable[Tensor]) -> None:
    """Raise RunError when not all outputs of the model, dense or compressed, are finite; names a damaged tensor."""
    if all(bool(torch.isfinite(x).all()) for x in outputs):
        return
    damaged = not_finite(checkpoint)
    if damaged is not None:
        raise RunError(f"{checkpoint.path}: {damaged} holds NaN or infinity; check the checkpoint for damage")
    raise RunError(
        f"{checkpoint.path}: the model's outputs on the dev set are not finite; try --dtype float32, or another recipe"
    )


def _assemble(partial: Path, walker: BlockWalker, scheme: ArtifactConfig, recipe: Recipe, parts: Sequence[str]) -> None:
    """Make `partial` a loadable checkpoint of its parts and the untouched tensors: shards, index, config, tokenizer."""
    replaced = {*scheme.linears, *([] if scheme.embedding is None else [walker.embedding])}
    family = walker.model.config.get_text_config().model_type
    kept = {
        disk_name(n, family): info for n, info in walker.stored().items() if n.removesuffix(".weight") not in replaced
    }
    packed = {n: info for part in parts for n, info in read_header(partial / part).items()}
    writer.write_shards({**kept, **packed}, partial, writer.SHARD_BYTES)
    config: dict[str, Any] = {**walker.checkpoint.config, "quantization_config": scheme.to_json()}
    config.pop("transformers_weights", None)
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(partial / "recipe.yaml", recipe.to_yaml())
    writer.copy_companions(walker.checkpoint.path, partial)
