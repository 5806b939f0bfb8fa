"""What scripts/gpu_suite.py can do without a GPU: plan, statistics, report, and saying that there is none."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from commands import load_script

pytest.importorskip("triton")

from halfweight.triton_kernels import cost


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    return load_script("gpu_suite")


def test_summary(suite: ModuleType) -> None:
    timing = suite.summary([float(value) for value in range(101)])
    assert (timing.median, timing.low, timing.high) == (50, 10, 90)
    assert suite.summary([3.0]) == suite.Timing(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no samples"):
        suite.summary([])


def test_copies_outgrow_the_cache_but_not_the_memory(suite: ModuleType) -> None:
    assert suite.copies_needed(10, 50, 10**6) == 21
    assert suite.copies_needed(10**6, 50, 10**9) == 2
    assert suite.copies_needed(10**6, 10**7, 8 * 10**6) == 4
    assert suite.copies_needed(10**9, 50, 10**9) == 1


def test_relative_error(suite: ModuleType) -> None:
    want = torch.tensor([3.0, 4.0, float("nan")])
    assert suite.relative_error(want, want) == 0
    assert suite.relative_error(torch.tensor([3.0, 4.5, float("nan")]), want) == pytest.approx(0.1)
    wrong = suite.relative_error(torch.tensor([float("nan"), 4.0, float("nan")]), want)
    assert not wrong <= 1  # NaN fails every tolerance


def test_report_and_calibration(suite: ModuleType, tmp_path: Path) -> None:
    timing = suite.Timing(10.0, 9.0, 12.0)
    rows = [
        suite.Measured("torch bf16", (64, 128), 1, "bfloat16", timing, 16_384),
        suite.Measured("int4", (64, 128), 1, "bfloat16", suite.Timing(4.0, 4.0, 4.0), 4_096, 3.5),
    ]
    checked = [
        suite.Check("int4.dot", (1, 64, 64), "float16", 0.5, False),
        suite.Check("a.b", (1, 1, 1), "f", 0.0, True),
    ]
    numbers = suite.calibration("h100", 3e12, 2e-6, 7e-7)
    text = suite.markdown("Kernels", checked, numbers, rows)
    assert (
        "1 of 2 kernel checks passed" in text and "FAILED int4.dot (1, 64, 64) float16: relative error 5.0e-01" in text
    )
    assert "| 64 x 128 | 1 | bfloat16 | int4 | 4.0 (4.0 - 4.0) | 1 | 2.50x | 3.5 |" in text
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(numbers))
    assert cost.calibrated(cost.GPUS["h100"], file).bandwidth == 3e12


def test_every_sampled_kernel_is_checked(suite: ModuleType) -> None:
    planned = suite.checks(["int4"], "sm_90")
    assert {kernel.name for kernel, _, _ in planned} >= {"int4.fragment", "int4.simt"}
    assert {dtype for _, _, dtype in planned} == {torch.float16, torch.bfloat16}
    assert not any(kernel.inline_asm for kernel, _, _ in suite.checks(["int4"], "gfx942"))


def test_gpus_are_recognised(suite: ModuleType) -> None:
    assert suite.nearest("NVIDIA H100 80GB HBM3", "sm_90").name == "h100"
    assert suite.nearest("NVIDIA A100-SXM4-80GB", "sm_80").name == "a100"
    assert suite.nearest("NVIDIA L40S", "sm_89").name == "4090"
    assert suite.nearest("NVIDIA B200", "sm_100").name == "h100"


def test_dry_run_lists_what_would_run(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--dry-run", "--op", "int4", "--model", "1B"]) == 0
    shown = capsys.readouterr().out
    assert "int4.fragment: M = 1, 8" in shown and "8192 x 2048: M = 1, 2, 4, 8" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(suite: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert suite.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
