"""Benchmarks through EleutherAI's lm-evaluation-harness, on models that `halfweight.load` loaded.

A task is one of lm-eval's names or a YAML file in its format, so data of one's own needs no network. Each finished task
is kept, with every document's answer, and not computed again when the same command runs later.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..serving.checkpoint import Checkpoint, read_json
from ..serving.durable import disk_errors, write_text
from ..serving.errors import InputError, RunError, did_you_mean
from ..serving.linear import read_all_in_prefill
from ..serving.load import load, load_tokenizer, resolve_device, resolve_dtype, stored_dtype
from .fit import require_fit
from .selection import require_scored_apart
from .task_results import TaskReport, TaskResult, task_results

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_IDENTITY = "halfweight"  # key of our own entry in lm-eval's result files
REPORT_NAME = "results.json"


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> TaskReport:
    """Run `tasks` on a checkpoint folder, dense or compressed; writes `out`/TASK.json (lm-eval's own) as each finishes
    and `out`/results.json (the report) at the end.

    `tasks` are names that lm-eval knows or YAML files; relative `data_files` in those are beside the YAML. `limit` is
    the number of documents per task (below 1: a fraction of them), `batch_size` a number or `auto`. `progress(done,
    total, task)` is called before each task and at the end. Under `accelerate launch` every process takes its share of
    the documents, and the first one writes. Raises InputError for unknown tasks, missing data, a bad model, or when
    lm-eval is not installed.
    """
    require_lm_eval()
    out, checkpoint = Path(out), Checkpoint(model)
    require_scored_apart(checkpoint.artifact, model)
    manager = task_manager(defaults=not all(_is_file(spec) for spec in tasks))
    specs = {spec: task_spec(spec, manager) for spec in tasks}
    files = {spec: out / f"{_file_stem(spec)}.json" for spec in specs}
    if len(set(files.values())) < len(specs):
        raise InputError(f"--tasks: two of {', '.join(specs)} have the same name; rename one of the files")
    where = resolve_device(device)
    computed = f"{resolve_dtype(dtype, where, stored_dtype(checkpoint))} on {where.type}"
    settings = [limit, num_fewshot, seed, computed, version("lm-eval")]
    identities = {spec: _identity(checkpoint, task, settings) for spec, task in specs.items()}
    finished = {spec for spec in specs if _is_finished(files[spec], identities[spec])}
    missing = [spec for spec in specs if spec not in finished]
    loaded = {spec: _load_task(manager, spec, specs[spec]) for spec in missing}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)

    runner = None if not missing else _runner(checkpoint, batch_size, device, dtype)
    first = runner is None or runner.rank == 0
    begin = time.monotonic()
    for number, spec in enumerate(missing):
        if progress is not None and first:
            progress(number, len(missing), spec)
        saved = _run(runner, loaded[spec], limit, num_fewshot, batch_size, seed, spec)
        if saved is not None:
            write_text(files[spec], _to_json({**saved, _IDENTITY: identities[spec]}))
    if progress is not None and missing and first:
        progress(len(missing), len(missing), "")
    report = TaskReport(
        model=str(model),
        tasks=_collect(files.values()) if first else [],
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=str(batch_size),
        processes=1 if runner is None else runner.world_size,
        dtype=dtype if runner is None else str(runner.model.dtype).removeprefix("torch."),
        device=str(where) if runner is None else str(runner.device),
        lm_eval=version("lm-eval"),
        resumed=sorted(finished),
        seconds=time.monotonic() - begin,
    )
    if first:
        write_text(out / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
    return report


def require_lm_eval() -> None:
    """Raise InputError, with the command that installs it, when lm-eval is not there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError("tasks need lm-evaluation-harness: pip install 'halfweight[eval]'") from None


@cache
def task_manager(defaults: bool) -> TaskManager:
    """lm-eval's index of its tasks, groups and tags; reading it takes seconds, and without `defaults` it is empty."""
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it explains its own code's choices at length
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def task_spec(spec: str, manager: TaskManager) -> str | dict[str, Any]:
    """A task name that lm-eval knows, or the configuration in a YAML file with its data's paths made absolute.

    Raises InputError for an unknown name, with the nearest one, and for a file that is not a task.
    """
    path = Path(spec)
    if not _is_file(spec):
        if spec not in manager.task_index:
            raise InputError(f"unknown task {spec!r}{_nearest(spec, manager)}")
        return spec
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such task file") from None
    except yaml.constructor.ConstructorError:
        return str(path.resolve())  # `!function` tags are read by lm-eval itself
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise InputError(f"{path}: not a task; it needs the key `task` (see docs/evaluation.md)")
    if "include" in config:
        return str(path.resolve())
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], path.resolve().parent)
    return config


def _nearest(name: str, manager: TaskManager) -> str:
    """A hint from the thousands of names; all of them would help nobody."""
    hint = did_you_mean(name, manager.all_tasks)
    return hint if hint.startswith("; did you mean") else "; `lm_eval ls tasks` lists them, or give a YAML file"


def _absolute(files: Any, folder: Path) -> Any:
    """`data_files` (a path, a list, or either per split) below `folder`; raises InputError for one that is missing."""
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    if "://" in str(files):
        return files
    path = folder / str(files)
    if not path.is_file() and not any(character in path.name for character in "*?["):
        raise InputError(f"task data {path}: no such file")
    return str(path)


def _is_file(spec: str) -> bool:
    return Path(spec).suffix in (".yaml", ".yml")


def _file_stem(spec: str) -> str:
    return Path(spec).stem if _is_file(spec) else spec


def _identity(checkpoint: Checkpoint, task: str | dict[str, Any], settings: list[Any]) -> str:
    """Tells a result of this model, task, data and settings from all others; SHA-256, hexadecimal."""
    digest = hashlib.sha256(checkpoint.stamp().encode())
    digest.update(json.dumps([task, settings], sort_keys=True, default=str).encode())
    options = task.get("dataset_kwargs") if isinstance(task, dict) else None
    for pattern in _flat(options.get("data_files") if isinstance(options, dict) else None):
        for file in sorted(glob.glob(pattern)):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _flat(files: Any) -> list[str]:
    """The paths in `data_files`."""
    if isinstance(files, dict):
        files = list(files.values())
    if isinstance(files, list):
        return [path for value in files for path in _flat(value)]
    return [] if files is None else [str(files)]


def _is_finished(file: Path, identity: str) -> bool:
    if not file.is_file():
        return False
    try:
        return read_json(file).get(_IDENTITY) == identity
    except InputError:
        return False  # damaged: computed again


def _load_task(manager: TaskManager, spec: str, task: str | dict[str, Any]) -> Any:
    """The task with its data, before the model takes up memory; raises InputError when the data is not to be had."""
    try:
        return manager.load([task])
    except ImportError as error:
        raise InputError(f"task {spec}: needs a package that is not installed ({error})") from None
    except Exception as error:  # datasets, fsspec and lm-eval raise many kinds; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if isinstance(task, dict):
            raise InputError(f"task {spec}: cannot be loaded ({reason}); check its fields and its data files") from None
        where = _dataset_of(manager, task)
        raise InputError(
            f"task {spec}: its data cannot be loaded ({reason}); download {where} into HF_HOME on a machine with a"
            " network, or give a YAML file over data of your own (docs/evaluation.md)"
        ) from None


def _dataset_of(manager: TaskManager, task: str) -> str:
    """The hub dataset a task reads, as far as its YAML says so."""
    path = getattr(manager.task_index.get(task), "yaml_path", None)
    text = Path(path).read_text(encoding="utf-8") if path is not None and Path(path).is_file() else ""
    found = re.search(r"^dataset_path:\s*(\S+)", text, re.MULTILINE)
    return "its dataset" if found is None else f"the dataset {found[1]}"


def _runner(checkpoint: Checkpoint, batch_size: int | str, device: str, dtype: str) -> Any:
    """lm-eval's model interface around the loaded checkpoint, on this process's device under `accelerate launch`."""
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    accelerator = Accelerator(cpu=resolve_device(device).type == "cpu") if _launched() else None
    place = device
    if accelerator is not None and accelerator.device.type == "cuda" and device == "auto":
        place = str(accelerator.device)  # of this process
    require_fit([checkpoint.path], place, dtype)
    network = load(checkpoint.path, place, dtype)
    read_all_in_prefill(network, dense=False)  # what is scored selects its inputs
    runner = HFLM(pretrained=network, tokenizer=load_tokenizer(checkpoint.path), batch_size=batch_size)
    if accelerator is not None and accelerator.num_processes > 1:
        # lm-eval shares documents out by rank; it only sets that up itself for models it loads itself.
        runner.accelerator = accelerator
        runner._rank, runner._world_size = accelerator.process_index, accelerator.num_processes
    return runner


def _launched() -> bool:
    """Whether `accelerate launch` (or torchrun) started this process as one of several."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _run(
    runner: Any,
    loaded: Any,
    limit: float | None,
    num_fewshot: int | None,
    batch_size: int | str,
    seed: int,
    spec: str,
) -> dict[str, Any] | None:
    """lm-eval's results with every document's answer; None on every process but the first. Raises RunError."""
    # Not `simple_evaluate`: it starts other programs to describe the machine, which takes longer than small tasks.
    from lm_eval import evaluate
    from transformers import set_seed

    set_seed(seed)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and num_fewshot is not None):  # a task that says 0 means it, as in lm-eval
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    try:
        saved = evaluate(lm=runner, task_dict=loaded, limit=limit, bootstrap_iters=1000)
    except ValueError as error:
        raise RunError(f"task {spec}: {' '.join(str(error).split())}") from None
    if saved is None:
        return None
    config = {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot, "seed": seed}
    return {**saved, "config": config, "lm_eval_version": version("lm-eval")}


def _collect(files: Any) -> list[TaskResult]:
    return [result for file in files for result in task_results(read_json(file), file)]


def _to_json(saved: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(saved, indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n"
