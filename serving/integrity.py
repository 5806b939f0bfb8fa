"""Whether a checkpoint folder still is what was written: the SHA-256 of every file, and the structure of every tensor.

The hashes lie in `SHA256SUMS`, in the format of coreutils: `sha256sum -c SHA256SUMS` checks them without halfweight.
They tell of damage and of edits, not of who made them; whoever wants that signs the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import INDEX_NAME, Checkpoint, TensorInfo, read_tensor
from .durable import sha256_of, write_text
from .errors import InputError
from .linear import CompressedWeight
from .scheme import LinearScheme, parse_nm
from .skeleton import build_skeleton, tensor_names
from .storage import validate, weight_specs

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")
# What every artifact has and reads; other files may come later (verdicts, a report page, a model card).
_OWN = ("config.json", "recipe.yaml", "report.json", INDEX_NAME)

_NUMBERS = 2**22  # looked at together


def write_sums(folder: Path, without: Collection[str] = ()) -> None:
    """Write `SHA256SUMS` of the files in `folder`, but those named in `without`. Raises RunError."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != SUMS and f.name not in without)
    write_text(folder / SUMS, "".join(f"{sha256_of(file)}  {file.name}\n" for file in files))


def check_files(folder: Path) -> tuple[int, list[str], list[str]]:
    """How many files of `folder` are as `SHA256SUMS` says, a line for each problem, and the files it does not cover."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, [f"{SUMS}: missing or unreadable, so the files cannot be checked; were they saved again?"], []
    problems: list[str] = []
    known: set[str] = set()
    good = 0
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{SUMS}: line {number} is not a hash and the name of a file in this folder")
            continue
        wanted, name = match.groups()
        known.add(name)
        try:
            same = sha256_of(folder / name) == wanted
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror}), but {SUMS} names it")
            continue
        if same:
            good += 1
        else:
            problems.append(f"{name}: was changed or damaged; its hash is not the one in {SUMS}")
    others = sorted(f.name for f in folder.iterdir() if f.name not in known and f.name != SUMS)
    strange = [name for name in others if name in _OWN or name.endswith(".safetensors")]
    problems += [f"{name}: {SUMS} does not name it" for name in strange]
    return good, problems, [name for name in others if name not in strange]


def check_tensors(
    path: str | Path, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> tuple[int, list[str]]:
    """How many stored weights of the artifact at `path` are valid forms of their schemes, and a line per problem.

    Every tensor is read, one weight at a time, and every floating-point number must be finite. Raises InputError when
    the folder is no artifact, or too damaged to say what its tensors should be.
    """
    checkpoint = Checkpoint(path)
    artifact = checkpoint.artifact
    if artifact is None:
        raise InputError(f"{path}: is not a halfweight checkpoint (no quantization_config)")
    model = build_skeleton(checkpoint, torch.float32)
    names = tensor_names(model, checkpoint.tensors)
    weights: dict[str, tuple[LinearScheme, tuple[int, int]]] = {
        name: (module.scheme, module.shape)
        for name, module in model.named_modules()
        if isinstance(module, CompressedWeight)
    }
    for name, scheme in artifact.linears.items():
        if scheme.storage == "dense":
            n, k = checkpoint.info(names[f"{name}.weight"]).shape
            weights[name] = scheme, (n, k)
    problems: list[str] = []
    claimed: set[str] = set()
    for done, (name, (scheme, shape)) in enumerate(weights.items()):
        progress(done, len(weights), name)
        stored = {suffix: names[f"{name}.{suffix}"] for suffix in weight_specs(scheme, shape)}
        claimed.update(stored.values())
        tensors = {suffix: checkpoint.info(key) for suffix, key in stored.items()}
        problem = _problem_of(name, scheme, shape, tensors)
        if problem is not None:
            problems.append(f"{next(iter(tensors.values())).file.name}: {name}: {problem}")
    for key, info in checkpoint.tensors.items():
        if key not in claimed and not _finite(key, info):
            problems.append(f"{info.file.name}: {key}: not all of its numbers are finite")
    progress(len(weights), len(weights), "")
    return len(weights) - len(problems), problems


def _problem_of(name: str, scheme: LinearScheme, shape: tuple[int, int], infos: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong with a stored weight `[N, K]`, or None."""
    tensors = {suffix: read_tensor(f"{name}.{suffix}", info) for suffix, info in infos.items()}
    try:
        validate(scheme, tensors, shape)
    except ValueError as error:  # a FormatError
        return str(error)
    unfit = next((suffix for suffix, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if unfit is not None:
        return f"{unfit} holds numbers that are not finite"
    if scheme.storage == "dense" and not _fits(tensors["weight"], scheme):
        return f"it has more non-zeros than pattern {scheme.pattern} allows"
    return None


def _fits(weight: Tensor, scheme: LinearScheme) -> bool:
    """Whether a weight `[N, K]` that is stored whole has the zeros of an N:M pattern."""
    nm = parse_nm(scheme.pattern)
    if nm is None:
        return True
    kept, size = nm
    if weight.shape[1] % size:
        return False
    return bool((weight.unflatten(1, (-1, size)).count_nonzero(-1) <= kept).all())


def not_finite(checkpoint: Checkpoint) -> str | None:
    """The name of a tensor that holds NaN or infinity, if there is one; reads them all."""
    return next((name for name, info in checkpoint.tensors.items() if not _finite(name, info)), None)


def _finite(name: str, info: TensorInfo) -> bool:
    """Whether all numbers of a tensor are finite, some rows at a time."""
    if not info.dtype.is_floating_point:
        return True
    if len(info.shape) < 2:
        return bool(torch.isfinite(read_tensor(name, info)).all())
    step = max(1, _NUMBERS // max(1, info.nbytes // info.dtype.itemsize // max(1, info.shape[0])))
    starts = range(0, info.shape[0], step)
    rows = (slice(start, min(start + step, info.shape[0])) for start in starts)
    return all(bool(torch.isfinite(read_tensor(name, info, None, "cpu", part)).all()) for part in rows)
