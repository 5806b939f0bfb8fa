"""`verify`: is an artifact what was written, was it made from what is at hand, and would it come out the same again?"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from pydantic import BaseModel

from ..serving.checkpoint import read_json
from ..serving.durable import sha256_of
from ..serving.errors import InputError
from ..serving.integrity import SUMS, check_files, check_tensors
from ..serving.sources import resolve_model
from . import provenance
from .blocks import open_dense
from .calibration import load_text, text_hash
from .driver import compress_checkpoint
from .recipe import Recipe
from .report import CompressionReport, OnProgress, Progress, silent

_TIMED = ("report.json", SUMS)  # the report holds timings, and the sums its hash


class VerifyReport(BaseModel):
    """`files` and `weights` are how many were found as written; `inputs` how many files and texts of the run are those
    at hand; `reproduced` whether a second compression gave the same bytes (None: it was not asked for). Everything that
    is wrong is in `problems`, what was not or could not be looked at in `notes`; one line each."""

    path: str
    files: int
    weights: int
    inputs: int
    reproduced: bool | None
    problems: list[str]
    notes: list[str]


def verify_checkpoint(
    folder: str | Path,
    model: str | Path | None = None,
    calibration: str | Path | None = None,
    *,
    reproduce: bool = False,
    trust_remote_code: bool = False,
    progress: OnProgress = silent,
) -> VerifyReport:
    """Check the artifact in `folder`: the hash of every file, and that every tensor is valid.

    With a `model` (as for `compress_checkpoint`), that its files are those that were compressed, and that the text is
    that of the run: the text `calibration` (a file, a hub dataset or `builtin`), or else the recipe's. `reproduce`
    compresses again, in `FOLDER.again`, and compares the bytes; when interrupted, the same call goes on with it. Raises
    InputError when there is no artifact or no such input at hand; what is wrong with the artifact is in the report.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if reproduce and model is None:
        raise InputError("--reproduce needs the source: pass --model")
    if calibration is not None and model is None:
        raise InputError("--calibration is checked beside the source: pass --model, too")
    found = VerifyReport(path=str(folder), files=0, weights=0, inputs=0, reproduced=None, problems=[], notes=[])
    if not _is_artifact(folder):
        raise InputError(f"{folder}: is not a halfweight checkpoint; verify takes a folder that compress wrote")
    progress(Progress("hash", 0, 1))
    found.files, found.problems, others = check_files(folder)
    if others:
        found.notes.append(f"not part of the artifact, not checked: {', '.join(others)}")
    _tensors(folder, found, progress)
    if model is None:
        return found
    report = _report(folder, found)
    if report is None or report.provenance is None:
        found.problems.append("report.json: says nothing of the inputs, so they cannot be checked")
        return found
    before = len(found.problems)
    source = resolve_model(
        str(model), trust_remote_code=trust_remote_code, report=lambda text: progress(Progress("model", 0, 1, text))
    )
    _model(source.path, report.provenance.model, found, progress)
    text = None if calibration is None else str(calibration)
    recipe = Recipe.load(folder / "recipe.yaml").with_calibration(data=text)
    _text(recipe, report.provenance.text, calibration is not None, found)
    if reproduce and len(found.problems) > before:
        found.notes.append("not compressed again: the inputs are others")
    elif reproduce:
        _environment(report, found)
        _again(folder, model, recipe, report, found, progress, trust_remote_code)
    return found


def _is_artifact(folder: Path) -> bool:
    """Whether `folder` looks like something halfweight wrote, however damaged."""
    if (folder / SUMS).is_file() or any(folder.glob("halfweight*.safetensors*")):
        return True
    try:
        return "quantization_config" in read_json(folder / "config.json")
    except InputError:
        return False


def _tensors(folder: Path, found: VerifyReport, progress: OnProgress) -> None:
    def show(done: int, total: int, name: str) -> None:
        progress(Progress("tensors", done, total, name))

    try:
        found.weights, problems = check_tensors(folder, show)
        found.problems += problems
    except InputError as error:
        found.problems.append(f"the tensors cannot be checked: {error}")


def _report(folder: Path, found: VerifyReport) -> CompressionReport | None:
    try:
        return CompressionReport.model_validate(read_json(folder / "report.json"))
    except ValueError as error:  # InputError and pydantic's
        found.problems.append(f"report.json: not readable as a report ({str(error).splitlines()[0]})")
        return None


def _model(path: Path, wanted: dict[str, str], found: VerifyReport, progress: OnProgress) -> None:
    """Compare the files of the dense checkpoint at `path` with the run's hashes."""
    progress(Progress("inputs", 0, 1, str(path)))
    have = provenance.model_hashes(open_dense(path))
    for name in sorted({*wanted, *have}):
        if name not in have:
            found.problems.append(f"{path / name}: missing, but it was there when the model was compressed")
        elif name not in wanted:
            found.problems.append(f"{path / name}: was not there when the model was compressed")
        elif have[name] != wanted[name]:
            found.problems.append(f"{path / name}: is not the file that was compressed; its hash is another")
        else:
            found.inputs += 1
    progress(Progress("inputs", 1, 1))


def _text(recipe: Recipe, wanted: str | None, given: bool, found: VerifyReport) -> None:
    """Compare the calibration text at hand with the run's hash."""
    data = recipe.calibration.data
    if wanted is None:
        found.notes.append("the model wrote the calibration text itself, so there is none to check")
    elif not given and data != "builtin" and not Path(data).is_file():
        found.notes.append(f"the calibration text {data} is not at hand, not checked; pass --calibration FILE")
    elif text_hash(load_text(recipe.calibration)) != wanted:
        found.problems.append(f"{data}: is not the text that the model was calibrated on; its hash is another")
    else:
        found.inputs += 1


def _environment(report: CompressionReport, found: VerifyReport) -> None:
    """Note what differs between the run's code and libraries and those here; different bytes may come from that."""
    was, now = report.versions, provenance.versions()
    changed = [f"{name} was {was.get(name, 'unknown')}, is {now[name]}" for name in now if was.get(name) != now[name]]
    recorded = report.provenance
    here = torch.get_num_threads()
    if recorded is not None and recorded.threads != here:
        changed.append(f"torch had {recorded.threads} threads, has {here}")
    if recorded is not None and recorded.code != provenance.code_hash() and not changed:
        changed.append("halfweight's code was another of the same version")
    if changed:
        found.notes.append(f"not the environment of the run: {', '.join(changed)}")


def _again(
    folder: Path,
    model: str | Path,
    recipe: Recipe,
    report: CompressionReport,
    found: VerifyReport,
    progress: OnProgress,
    trust_remote_code: bool,
) -> None:
    """Compress once more in a folder beside `folder`, compare, and remove it."""
    again = folder.with_name(folder.name + ".again")
    compress_checkpoint(
        model,
        recipe,
        again,
        device=report.device,
        dtype=report.dtype,
        overwrite=True,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    # The recipe that ran is the folder's own; a text given by another name is all that could differ.
    names = sorted(file.name for file in again.iterdir() if file.name not in (*_TIMED, "recipe.yaml"))
    other = [name for name in names if not _same(folder / name, again / name)]
    shutil.rmtree(again)
    found.reproduced = not other
    found.problems += [f"{name}: compressing again gives other bytes" for name in other]


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and sha256_of(a) == sha256_of(b)
