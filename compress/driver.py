"""The one way through a compression: resolve the recipe, do the work (`run.py`), assemble, verify, report, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..eval.perplexity import summarize
from ..serving.checkpoint import read_header
from ..serving.durable import write_text
from ..serving.errors import RunError
from ..serving.inspect import inspect_checkpoint
from ..serving.load import load_tokenizer, resolve_device, stored_dtype
from ..serving.scheme import ArtifactConfig
from ..serving.sources import resolve_model
from . import vocabulary, writer
from .blocks import BlockWalker, compute_dtype, open_dense
from .calibration import load_windows
from .journal import Journal, fingerprint, tokens_hash
from .memory import peak_rss_gb, release_memory
from .recipe import Recipe
from .report import (
    CompressionReport,
    DevPerplexity,
    OnProgress,
    Progress,
    silent,
)
from .run import Run


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
    progress: OnProgress = silent,
) -> CompressionReport:
    """Compress `model` by `recipe` into the new checkpoint folder `out`, verify it by reloading, and report.

    `model` is a folder, a hub id, a GGUF file or `demo`; `recipe` a Recipe, a file or a shipped name. Blocks are
    computed in `dtype` on `device` and stored in the checkpoint's own dtype. Memory stays at a block or two, the
    embeddings and the calibration activations. Interrupted work stays in `OUT.partial`, and the same call resumes it;
    `fresh` discards it. Raises InputError for bad input and RunError when the work fails; `out` appears only when
    everything succeeded.
    """
    begin = time.monotonic()
    out = Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    source = resolve_model(
        str(model),
        trust_remote_code=trust_remote_code,
        report=lambda text: progress(Progress("model", 0, 1, text)),
    )
    checkpoint = open_dense(source.path)
    where = resolve_device(device)
    walker = BlockWalker(checkpoint, where, compute_dtype(dtype, where, stored_dtype(checkpoint)))
    shapes = walker.linear_shapes()
    stages = recipe.resolve(shapes)
    if recipe.embeddings is not None:
        vocabulary.check_supported(checkpoint, recipe.embeddings)
    partial = writer.prepare(out, overwrite)
    with writer.alone_in(partial):
        with writer.no_empty_leftover(partial):
            writer.require_space(partial, 2 * sum(info.nbytes for info in checkpoint.tensors.values()))
            tokenizer = load_tokenizer(source.path)
            samples = 0 if recipe.tuning is None else recipe.tuning.samples or 0
            windows = load_windows(recipe.calibration, tokenizer, source.path, walker.max_length, tuning=samples)
        del tokenizer
        release_memory()
        settings = (recipe.to_yaml(), str(walker.dtype), where.type)
        identity = fingerprint(checkpoint, [*windows.all, *windows.dev], *settings)
        journal = Journal(partial, identity, fresh)
        run = Run(walker, stages, recipe, windows, journal, progress)
        resumed = run.all_blocks()
        parts = run.whole(identity)

        schemes = {name: stage.scheme(shapes[name]) for name, stage in run.stages.items()}
        scheme = ArtifactConfig(linears=schemes, prefill=recipe.prefill)
        if recipe.embeddings is not None:
            integers = recipe.embeddings.integers()
            heads = {table.name: integers.dense for table in run.tables if table.name != walker.embedding}
            scheme = scheme.model_copy(update={"linears": {**scheme.linears, **heads}, "embedding": integers})
        _assemble(partial, walker, scheme, recipe, parts)
        release_memory()
        progress(Progress("verify", 0, 1))
        verification, compressed_losses = run.verify(partial)
        dense_losses = walker.losses(run.dev_dense, windows.dev)
        inspection = inspect_checkpoint(partial)
        report = CompressionReport(
            model=source.name,
            note=source.note,
            recipe=recipe.name,
            out=str(out),
            seconds=time.monotonic() - begin,
            peak_rss_gb=peak_rss_gb(),
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
                dense=summarize(dense_losses)[0],
                compressed=summarize(compressed_losses)[0],
                tokens=sum(len(loss) for loss in dense_losses),
                windows=len(windows.dev),
                seqlen=len(windows.dev[0]),
            ),
            verification=verification,
            layers=run.layers,
            tables=run.tables,
            tuning=run.tuned,
            versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
        )
        if fingerprint(checkpoint, [*windows.all, *windows.dev], *settings) != identity:
            raise RunError(f"{source.path}: the model's files changed during the run; run it again with --fresh")
        write_text(partial / "report.json", report.model_dump_json(indent=2) + "\n")
        writer.publish(partial, out)
        for name in (*(str(entry["part"]) for entry in journal.entries), writer.JOURNAL):
            (out / name).unlink()
        progress(Progress("verify", 1, 1))
        return report


def _assemble(partial: Path, walker: BlockWalker, scheme: ArtifactConfig, recipe: Recipe, parts: Sequence[str]) -> None:
    """Make `partial` a loadable checkpoint of its parts and the untouched tensors: shards, index, config, tokenizer."""
    replaced = {*scheme.linears, *([] if scheme.embedding is None else [walker.embedding])}
    kept = {n: info for n, info in walker.stored().items() if n.removesuffix(".weight") not in replaced}
    packed = {n: info for part in parts for n, info in read_header(partial / part).items()}
    writer.write_shards({**kept, **packed}, partial, writer.SHARD_BYTES)
    config: dict[str, Any] = {**walker.checkpoint.config, "quantization_config": scheme.to_json()}
    config.pop("transformers_weights", None)
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(partial / "recipe.yaml", recipe.to_yaml())
    writer.copy_companions(walker.checkpoint.path, partial)
