"""How fast an artifact prefills and decodes on this device, beside its dense and int4 rivals, and what it runs on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, Field

from ..serving import verdicts
from ..serving.checkpoint import Checkpoint
from ..serving.errors import InputError, RunError
from ..serving.linear import core_inputs
from ..serving.load import resolve_device, resolve_dtype, stored_dtype
from ..serving.skeleton import build_skeleton, context_length, load_config
from ..serving.warmup import warmup
from . import layer_speed, rivals
from .layer_speed import LayerSpeed
from .rivals import Contender
from .timing import Spread, generation_seconds, memory_growth

LAYER_ROUNDS = 5
STEADY = 1.3  # decode rates of one setting's rounds, fastest over slowest


class ModelSpeed(BaseModel):
    """One model in one setting. Rates are tokens per second of all `batch` sequences together.

    `gigabytes_per_second`: bytes of the weights that a decode step reads, 10^9, over the median step. `memory_bytes`:
    the weights, and by how much memory grew while the model ran (`weight_bytes` alone where the system does not say).
    `ratio_to_dense` and `ratio_to_int4`: the decode rate over that rival's in the best of its settings.
    """

    model: str
    dtype: str
    threads: int | None
    batch: int
    prefill: Spread
    decode: Spread
    gigabytes_per_second: float
    weight_bytes: int
    memory_bytes: int
    ratio_to_dense: float | None = None
    ratio_to_int4: float | None = None


class Kernel(BaseModel):
    """What runs `count` linears of one kind in `dtype`; `reason` says why, above all where it is the reference."""

    pattern: str
    numbers: str
    shape: tuple[int, int]
    count: int
    dtype: str
    backend: str
    reason: str


class Speed(BaseModel):
    """Result of `bench`: models side by side, what runs the linears, and the verdict on every kind of linear."""

    folder: str
    dense: str
    int4: str
    device: str
    machine: str
    prompt: int
    new: int
    rounds: int
    models: list[ModelSpeed] = Field(min_length=1)
    kernels: list[Kernel]
    layers: list[LayerSpeed]
    versions: dict[str, str]

    @property
    def unsteady(self) -> str:
        """A warning when some setting's rounds differ so much that other work must have had the machine; else empty."""
        widest = max(row.decode.high / max(row.decode.low, 1e-9) for row in self.models)
        if widest <= STEADY:
            return ""
        return (
            f"Rounds of one setting differ by up to {widest:.1f}x: the machine was busy; measure again when it is not."
        )


def bench(
    folder: str | Path,
    dense: str | Path | None = None,
    *,
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 128,
    new: int = 128,
    rounds: int = 3,
    dtypes: Sequence[str] = ("auto",),
    threads: Sequence[int] = (),
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Time the artifact in `folder` on this device, beside the model in `dense` (None: the artifact's own weights,
    expanded) and beside dense int4 of the artifact's weights.

    Every model prefills `prompt` random tokens per sequence and decodes `new` more, in every combination of `batches`,
    `dtypes` and, on a CPU, `threads` (default: as torch is set). All settings take turns, `rounds` times after one
    short turn that does not count. Then all linears of the compressed kinds are timed one by one, on each of `batches`
    tokens, and on `prompt` tokens as in a prefill, in the first thread setting. Raises InputError for a folder that is
    not an artifact, a text longer than the context, or models that do not fit in memory, and RunError when memory
    runs out all the same.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    where = resolve_device(device)
    if checkpoint.artifact is None:
        raise InputError(f"{folder}: a dense checkpoint; bench times a compressed one, with this as its --dense")
    config = load_config(checkpoint)
    context = context_length(config)
    if context is not None and prompt + new > context:
        raise InputError(f"--prompt {prompt} and --new {new} exceed the model's context of {context} tokens")
    names = default_dtypes(where) if tuple(dtypes) == ("auto",) else tuple(dtypes)
    resolved = list(dict.fromkeys(resolve_dtype(name, where, stored_dtype(checkpoint)) for name in names))
    counts = [*threads] if where.type == "cpu" and threads else [torch.get_num_threads()]
    dense_folder = None if dense is None else Path(dense)
    check_memory(checkpoint, where, resolved)
    before = torch.get_num_threads()
    try:
        contenders = {dtype: _contenders(folder, dense_folder, where, dtype) for dtype in resolved}
        kernels = [kernel for dtype in resolved for kernel in _kernels(contenders[dtype], batches)]
        vocabulary = int(config.get_text_config().vocab_size)
        everyone = [contender for found in contenders.values() for contender in found]
        models = _models(everyone, batches, counts, prompt, new, rounds, vocabulary, seed, progress)
        torch.set_num_threads(counts[0])
        sizes = list(dict.fromkeys([*batches, prompt]))
        layers = [
            layer
            for dtype in resolved
            for tokens in sizes
            for layer in _layers(contenders[dtype], tokens, tokens in batches, seed)
        ]
        name = verdicts.device_name(where)
    except torch.OutOfMemoryError as error:
        raise RunError(f"{where}: out of memory ({str(error).splitlines()[0]}); fewer --dtypes need less") from None
    finally:
        torch.set_num_threads(before)
    return Speed(
        folder=str(folder),
        dense="the artifact's own weights, expanded" if dense is None else str(dense),
        int4=_int4_note(contenders[resolved[0]]),
        device=name,
        machine=platform.platform(terse=True),
        prompt=prompt,
        new=new,
        rounds=rounds,
        models=_with_ratios(models),
        kernels=kernels,
        layers=layers,
        versions={package: version(package) for package in ("torch", "transformers")},
    )


def default_dtypes(device: torch.device) -> tuple[str, ...]:
    """The settings in which a dense model may be fastest: on a CPU that depends on the processor."""
    return ("float32", "bfloat16") if device.type == "cpu" else ("auto",)


def check_memory(checkpoint: Checkpoint, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raise InputError when the models in every dtype are sure not to fit beside each other."""
    kinds = layer_speed.kinds_of(build_skeleton(checkpoint, torch.float32))
    expanded = sum(len(members) * shape[0] * shape[1] for (_, _, shape), members in kinds.items())
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    needed = sum(stored + expanded * dtype.itemsize for dtype in dtypes)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{device}: {free / 1e9:.1f} GB free, but the models beside each other in {len(dtypes)} dtypes need more"
            f" than {needed / 1e9:.1f} GB; name one of --dtypes, or use a larger device"
        )


def _contenders(folder: Path, dense: Path | None, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    found = [rivals.compressed(folder, device, dtype), rivals.dense(folder, dense, device, dtype)]
    int4 = rivals.int4(folder, device, dtype)
    return found if int4 is None else [*found, int4]


def _kernels(contenders: Sequence[Contender], batches: Sequence[int]) -> list[Kernel]:
    """Check and choose what runs every contender, and list the artifact's choices by kind."""
    # The rivals are warmed up too: their best kernels may have to pass their check first.
    warmed = [warmup(contender.model, sorted(batches), contender.dtype) for contender in contenders]
    contender, choices = contenders[0], {choice.name: choice for choice in warmed[0]}
    return [
        Kernel(
            pattern=scheme.pattern,
            numbers=scheme.numbers,
            shape=shape,
            count=len(members),
            dtype=str(contender.dtype).removeprefix("torch."),
            backend=choices[members[0]].backend,
            reason=choices[members[0]].reason,
        )
        for (_, scheme, shape), members in layer_speed.kinds_of(contender.model).items()
    ]


def _layers(contenders: list[Contender], tokens: int, decoding: bool, seed: int) -> list[LayerSpeed]:
    """Every linear's times; those whose inputs a prompt chooses read these in `decoding`, and all in a prefill."""
    for core in core_inputs(contenders[0].model):
        core.decoding = decoding
    return layer_speed.measure(contenders, tokens, LAYER_ROUNDS, seed)


def _models(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    threads: Sequence[int],
    prompt: int,
    new: int,
    rounds: int,
    vocabulary: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[ModelSpeed]:
    """Every contender in every setting, in turns."""
    device = contenders[0].model.device
    generator = torch.Generator().manual_seed(seed)
    prompts = {b: torch.randint(0, vocabulary, (b, prompt), generator=generator).to(device) for b in batches}
    settings = [(c, batch, count) for batch in batches for c in contenders for count in threads]
    taken: list[list[tuple[float, float]]] = [[] for _ in settings]
    growth: list[int | None] = [None for _ in settings]
    for turn in range(rounds + 1):
        for index, (contender, batch, count) in enumerate(settings):
            torch.set_num_threads(count)
            if turn:
                taken[index].append(generation_seconds(contender.model, prompts[batch], new))
            else:
                short = partial(generation_seconds, contender.model, prompts[batch], min(new, 4))
                growth[index] = memory_growth(device, short)
            if progress is not None:
                progress(turn * len(settings) + index + 1, (rounds + 1) * len(settings))
    rows = []
    for (contender, batch, count), times, grown in zip(settings, taken, growth, strict=True):
        decode = Spread.of([batch * new / seconds for _, seconds in times])
        rows.append(
            ModelSpeed(
                model=contender.name,
                dtype=str(contender.dtype).removeprefix("torch."),
                threads=count if device.type == "cpu" else None,
                batch=batch,
                prefill=Spread.of([batch * prompt / seconds for seconds, _ in times]),
                decode=decode,
                gigabytes_per_second=contender.read * decode.median / batch / 1e9,
                weight_bytes=contender.weights,
                memory_bytes=contender.weights + (grown or 0),
            )
        )
    return rows


def _with_ratios(rows: list[ModelSpeed]) -> list[ModelSpeed]:
    """The rows with their decode rates over each rival's best at the same batch size."""
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row.model, row.batch)
        best[key] = max(best.get(key, 0.0), row.decode.median)

    def ratio(row: ModelSpeed, rival: str) -> float | None:
        return row.decode.median / best[rival, row.batch] if (rival, row.batch) in best else None

    return [
        row.model_copy(update={"ratio_to_dense": ratio(row, "dense"), "ratio_to_int4": ratio(row, "int4")})
        for row in rows
    ]


def _int4_note(contenders: Sequence[Contender]) -> str:
    if not any(contender.name == "int4" for contender in contenders):
        return "the artifact is dense int4 itself"
    return f"the same linears; rounded in groups of {rivals.INT4_GROUP} where int4 cannot hold them, for timing only"
