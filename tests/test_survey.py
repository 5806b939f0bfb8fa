"""`halfweight kernels`: the rows it prints, their cache, and its refusals."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from typer.testing import CliRunner

from halfweight.cli.app import app
from halfweight.serving.errors import InputError
from halfweight.triton_kernels import cost, survey
from halfweight.triton_kernels.launch import Shape

TINY = survey.Model("Tiny-0B", 256, 128, 512)


def test_linears_of_a_model() -> None:
    assert survey.MODELS[1].linears() == {
        **{"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)},
        **{"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)},
    }


def test_selected_inputs_are_shared_by_tokens() -> None:
    assert survey.read_share("int4", 8) == 1
    assert [survey.read_share("input_select", m) for m in (1, 2, 3)] == [0.5, 0.75, 0.875]


def test_facts_are_metered_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, gpu = survey.Case("two_four", Shape(1, 256, 512), "h100", "float16"), cost.GPUS["h100"]
    ((_, facts),) = survey.facts([case], gpu, tmp_path)
    assert facts.metered and facts.spills == 0 and facts.minimum_bytes <= facts.bytes <= 1.03 * facts.minimum_bytes
    assert facts.instructions_per_weight > 0 and facts.microseconds > 1e6 * gpu.overhead
    monkeypatch.setattr(survey, "facts_of", lambda *_: pytest.fail("computed again"))
    assert list(survey.facts([case], gpu, tmp_path)) == [(case, facts)]
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(pytest.fail.Exception):  # a damaged file is computed again
        list(survey.facts([case], gpu, tmp_path))


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "facts_of", lambda case, gpu: FACTS)
    monkeypatch.setattr(survey, "facts", lambda cases, gpu, cache: ((case, FACTS) for case in cases))
    result = survey.survey([TINY], ["two_four"], cost.GPUS["a100"], "bfloat16", tmp_path)
    assert len(result.rows) == 7 * 4 and result.times == "modelled"
    row = result.rows[0]
    assert (row.op, row.linear, row.shape, row.m, row.gpu) == ("two_four", "q", (256, 256), 1, "a100")
    assert row.bytes_over_minimum == 1.25 and row.int4_us == 3.0
    assert row.dense_us == pytest.approx(cost.stream_microseconds(cost.GPUS["a100"], 2 * (256 * 256 + 512)))


FACTS = survey.Facts(("two_four.mma_sp",), 1000, 800, True, 64, 0, 32, 4096, 2.5, 3.0, "dram")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "facts", lambda cases, gpu, cache: ((case, FACTS) for case in cases))
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    file = tmp_path / "kernels.json"
    result = CliRunner().invoke(
        app, ["kernels", "--gpu", "a100", "--op", "two_four", "--model", "1b", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "Llama-3.2-1B on A100 SXM 80 GB, bfloat16: times are modelled" in result.output
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 28
    wanted = {"op", "shape", "m", "gpu", "dtype", "bytes", "bytes_over_minimum", "spills", "registers"}
    assert wanted | {"instr_per_weight", "modelled_us", "bound"} <= rows[0].keys()


@pytest.mark.parametrize(
    "arguments",
    [["--gpu", "v100"], ["--op", "nothing"], ["--dtype", "int3"], ["--model", "9B"], ["--calibration", "/"]],
)
def test_bad_arguments_are_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert isinstance(result.exception, InputError) and "\n" not in str(result.exception)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "triton":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    result = CliRunner().invoke(app, ["kernels"])
    assert isinstance(result.exception, InputError) and "needs Triton" in str(result.exception)
