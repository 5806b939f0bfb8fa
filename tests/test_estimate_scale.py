"""The estimate for large models: bytes from the plan, times from the throughputs it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from commands import load_script


def test_estimates_follow_from_counts_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("estimate_scale")
    monkeypatch.setitem(script.MODELS, "8B", {**script.MODELS["8B"], "num_hidden_layers": 2})
    rates = ["--matmul-tflops", "400", "--solver-tflops", "40", "--network-gbs", "100", "--storage-gbs", "1e-9"]
    options = ["--models", "8B", "--processes", "1,2,8", "--price", "3", "--recipe", "2of4-sparsegpt"]
    monkeypatch.setattr(sys, "argv", ["estimate_scale", *rates, *options, "--json", str(tmp_path / "rows.json")])
    script.main()
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["kind"] == "estimate"
    one, two, eight = result["rows"]
    linears = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096 + 5 * 4096
    for row in (one, two, eight):
        assert row["read_gb"] == pytest.approx(2 * (linears + rest) / 1e9)
        assert row["written_gb"] == pytest.approx((9 / 8 * linears + 2 * rest) / 1e9)
        # A byte per second: storage is all that counts.
        assert row["hours"] == pytest.approx((row["read_gb"] + 4 * row["written_gb"]) * 1e9 / 3600, rel=1e-4)
        assert row["price"] == pytest.approx(3 * row["hours"] * row["processes"])
    # Per block: a chain of half and a broadcast of whole fp32 Gram matrices, three of 4096 and one of 14336 squared.
    grams = 2 * 6 * (3 * 4096**2 + 14336**2)
    assert one["received_gb"] == 0
    assert two["received_gb"] == eight["received_gb"] == pytest.approx((grams + 9 / 8 * linears) / 1e9)
    assert one["device_gb"] > two["device_gb"] > eight["device_gb"]


def test_what_waits_for_the_largest_linear_does_not_shrink() -> None:
    script = load_script("estimate_scale")
    rates = script.argparse.Namespace(matmul=1.0, solver=1.0, network=1.0, storage=1.0, efficiency=0.5)
    assert script.seconds(script.Work(8.0, 2.0, 0.0, 3.0), 1.0, rates, 1) == 8 + 2 + 3 + 4
    assert script.seconds(script.Work(4.0, 2.0, 5.0, 3.0), 1.0, rates, 2) == (4 + 2) / 0.5 + 5 + 3 + 4
