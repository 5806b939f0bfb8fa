"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def ok(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def read(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("halfweight-*.safetensors")))


def one_line(result: Result) -> str:
    """The single line on stderr of a command that failed as it should."""
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: ")
    assert result.out == ""
    return result.err


def process(*arguments: Any, cwd: Path) -> Result:
    """`python -m halfweight ARGUMENTS` in a process of its own."""
    path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")}
    command = [sys.executable, "-m", "halfweight", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=env, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def load_script(name: str) -> ModuleType:
    """The module of scripts/<name>.py, which is no part of the package."""
    file = Path(__file__).resolve().parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
