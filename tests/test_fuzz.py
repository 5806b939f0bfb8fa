"""A short run of scripts/fuzz.py: damaged files are refused, and what is accepted computes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from commands import load_script
from halfweight.triton_kernels.cpu import jit

pytestmark = pytest.mark.skipif(not jit.available()[0], reason=jit.available()[1])


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_script("fuzz")


@pytest.mark.parametrize("name", ["checkpoint", "recipe", "text"])
def test_damaged_inputs_are_refused_and_nothing_else_happens(fuzz: ModuleType, name: str, tmp_path: Path) -> None:
    target = fuzz.TARGETS[name]()
    assert fuzz.run(target, 700, seed=1, seconds=30, memory=1 << 20, keep=tmp_path) == []
    assert target.outcomes["accepted"] >= len(target.seeds)
    assert len(target.outcomes) > 15


def test_a_failure_is_reported_and_its_input_kept(fuzz: ModuleType, tmp_path: Path) -> None:
    target = fuzz.texts()

    def read(folder: Path) -> str:
        (file,) = folder.iterdir()
        if b"9" * 30 in file.read_bytes():
            raise IndexError("out of bounds")
        return "accepted"

    target.read = read
    failures = fuzz.run(target, 3000, seed=0, seconds=30, memory=1 << 20, keep=tmp_path)
    assert failures and "IndexError: out of bounds" in failures[0]
    assert any(tmp_path.iterdir())
