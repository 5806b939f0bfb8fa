"""Models side by side: every number against its definition on whole logits, tests against hand-computed cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfweight
from commands import Cli, Result, ok, one_line, read
from halfweight.eval import compare as comparing
from halfweight.eval.compare import Comparison
from halfweight.eval.metrics import calibration_error
from halfweight.eval.significance import mcnemar, paired_difference, sign_flip
from halfweight.eval.text import consecutive_windows, read_text, tokenize
from halfweight.eval.timing import Spread
from halfweight.serving.errors import RunError
from halfweight.serving.linear import CompressedWeight

SEQLEN, WINDOWS, NEW = 48, 5, 6

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def compared(llama: Path, compressed: Path, text_file: Path) -> Comparison:
    return comparing.compare(
        llama,
        [compressed, llama],
        text=text_file,
        windows=WINDOWS,
        seqlen=SEQLEN,
        prompts=3,
        prompt_tokens=8,
        new_tokens=NEW,
    )


def test_text_numbers_are_those_of_whole_logits(
    llama: Path, compressed: Path, text_file: Path, compared: Comparison
) -> None:
    tokens = tokenize(halfweight.load_tokenizer(llama), read_text(text_file))
    windows = torch.stack(consecutive_windows(tokens, SEQLEN, None, WINDOWS))
    targets = windows[:, 1:]
    with torch.no_grad():
        p, q = (halfweight.load(m)(windows).logits[:, :-1].double().log_softmax(-1) for m in (llama, compressed))
    losses = [-x.gather(-1, targets[..., None])[..., 0].mean(1) for x in (p, q)]
    dense, model, itself = compared.models
    against = model.against_dense
    assert against is not None
    assert dense.against_dense is None
    assert dense.perplexity == pytest.approx(math.exp(losses[0].mean()), rel=1e-4)
    assert model.perplexity == pytest.approx(math.exp(losses[1].mean()), rel=1e-4)
    paired = losses[1] - losses[0]
    assert against.perplexity_ratio == pytest.approx(math.exp(paired.mean()), rel=1e-4)
    error = math.exp(paired.mean()) * float(paired.std()) / math.sqrt(WINDOWS)
    assert against.ratio_standard_error == pytest.approx(error, rel=1e-3)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert against.kl == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert against.kl_standard_error == pytest.approx(float(divergence.mean(1).std()) / math.sqrt(WINDOWS), rel=1e-3)
    assert against.token_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.01)
    best = q.max(-1)
    expected = calibration_error(best.values.exp(), best.indices == targets)
    assert model.calibration_error == pytest.approx(expected, abs=0.01)
    assert itself.against_dense is not None
    assert itself.against_dense.kl == pytest.approx(0, abs=1e-6)
    assert itself.against_dense.perplexity_ratio == pytest.approx(1)
    assert itself.against_dense.token_agreement == 1
    assert itself.against_dense.same_generations == 1


def test_generation_agreement_is_of_greedy_continuations(
    llama: Path, compressed: Path, text_file: Path, compared: Comparison
) -> None:
    tokens = tokenize(halfweight.load_tokenizer(llama), read_text(text_file))
    shared = []
    models = [halfweight.load(m) for m in (llama, compressed)]
    for window in consecutive_windows(tokens, SEQLEN, None, 3):
        rows = [window[:8], window[:8]]
        for _ in range(NEW):
            with torch.no_grad():
                tops = [m(row[None]).logits[0, -1].argmax() for m, row in zip(models, rows, strict=True)]
            rows = [torch.cat([row, top[None]]) for row, top in zip(rows, tops, strict=True)]
        same = (rows[0][8:] == rows[1][8:]).long()
        shared.append(int(same.cumprod(0).sum()))
    against = compared.models[1].against_dense
    assert against is not None
    assert against.generation_agreement == pytest.approx(sum(shared) / (3 * NEW))
    assert against.same_generations == pytest.approx(sum(count == NEW for count in shared) / 3)


def test_sizes_come_from_the_checkpoints(llama: Path, compressed: Path, compared: Comparison) -> None:
    dense, model, _ = compared.models
    assert (dense.effective_bits, model.effective_bits) == (16, 9)
    assert dense.bytes == (llama / "model.safetensors").stat().st_size
    assert model.bytes < dense.bytes
    assert model.load_seconds > 0
    assert [row.name for row in compared.models] == [llama.name, compressed.name, f"{llama.name}-2"]


def test_speed_is_of_turns_beside_the_dense_model(
    llama: Path, compressed: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds as a machine gives them that slows down, the compressed model at twice the dense one's rates."""
    order: list[bool] = []

    def seconds(model: torch.nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float]:
        order.append(any(isinstance(module, CompressedWeight) for module in model.modules()))
        slow = len(order) * (0.5 if order[-1] else 1.0)
        return ids.numel() * slow, new * slow

    monkeypatch.setattr(comparing, "generation_seconds", seconds)
    settings = {"text": text_file, "windows": 1, "seqlen": SEQLEN, "prompts": 1, "prompt_tokens": 8, "new_tokens": NEW}
    found = comparing.compare(llama, [compressed], **settings)
    dense, model = found.models
    assert order == [False, True] * 4  # one turn each that does not count
    assert found.speed_prompt == SEQLEN - NEW
    assert dense.decode == Spread(median=1 / 5, low=1 / 7, high=1 / 3, count=3)
    assert model.prefill == model.decode == Spread(median=1 / 3, low=1 / 4, high=1 / 2, count=3)
    assert model.against_dense is not None
    assert model.against_dense.decode_ratio == model.against_dense.prefill_ratio == pytest.approx(5 / 3)
    untimed = comparing.compare(llama, [compressed], speed=False, **settings)
    assert len(order) == 8
    assert (untimed.models[0].decode, untimed.speed_prompt) == (None, 0)


def test_command_line(llama: Path, compressed: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ["--text", text_file, "--windows", 2, "--seqlen", 64, "--new-tokens", 4, "--json", tmp_path / "c.json"]
    result = ok(cli("compare", llama, compressed, *flags))
    report = read(tmp_path / "c.json")
    assert [row["effective_bits"] for row in report["models"]] == [16, 9]
    assert report["new_tokens"] == 4
    for line in ("perplexity", "KL to dense", "same greedy tokens", "effective bits", "size on disk", "load time"):
        assert line in result.out
    assert result.out.count("x dense)") == 2
    quiet = ok(cli("compare", llama, compressed, *flags, "--no-speed"))
    assert "x dense)" not in quiet.out


def test_an_interrupted_comparison_goes_on_with_the_next_model(
    llama: Path, compressed: Path, text_file: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    score = comparing.score_window

    def stops_after(count: int) -> None:
        def window(model: Any, *arguments: Any) -> Any:
            if len(scored) == count:
                raise RunError("stopped")
            scored.append(str(model.dtype))
            return score(model, *arguments)

        scored.clear()
        monkeypatch.setattr(comparing, "score_window", window)

    def run(name: str, *more: object) -> Result:
        flags = ("--text", text_file, "--windows", 2, "--seqlen", 64, "--new-tokens", 4, "--no-speed")
        return cli("compare", llama, compressed, llama, *flags, "--json", tmp_path / name, *more)

    def numbers(name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read(tmp_path / name)["models"]
        return [{key: value for key, value in row.items() if key != "load_seconds"} for row in rows]

    stops_after(6)
    ok(run("whole.json"))
    stops_after(5)  # in the last model
    assert run("c.json").err.endswith("error: stopped\n")
    stops_after(2)
    ok(run("c.json"))
    assert numbers("c.json") == numbers("whole.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "whole.json"]
    stops_after(5)
    run("c.json")
    stops_after(6)
    ok(run("c.json", "--new-tokens", 5))  # other settings: no model counts
    assert len(scored) == 6


def test_bad_input_is_one_line(
    llama: Path, compressed: Path, make_model: Callable[..., Path], text_file: Path, tmp_path: Path, cli: Cli
) -> None:
    other = make_model("llama", vocab_size=128)
    flags = ["--text", text_file, "--seqlen", 64]
    assert "another vocabulary" in one_line(cli("compare", llama, other, *flags))
    assert "config.json: no such file" in one_line(cli("compare", llama, tmp_path / "none", *flags))
    assert "fewer than --windows" in one_line(cli("compare", llama, compressed, *flags, "--windows", 1000))
    assert "exceed --seqlen 64" in one_line(cli("compare", llama, compressed, *flags, "--new-tokens", 40))
    assert "names, separated by commas" in one_line(cli("compare", llama, compressed, "--tasks", ","))
    assert "--batch-size 'x'" in one_line(cli("compare", llama, compressed, "--batch-size", "x"))


def test_mcnemar_by_hand() -> None:
    # 1 against 7: 2 * (C(8,0) + C(8,1)) / 2^8.
    assert mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(7, 1) == pytest.approx(18 / 256)
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1


def test_sign_flip_counts_sign_patterns() -> None:
    # All 2^5 patterns of five like signs: only two reach the observed mean.
    assert sign_flip([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)
    assert sign_flip([0.0, 0.0]) == 1
    assert sign_flip([0.1 * i for i in range(1, 40)]) < 0.001
    assert sign_flip([1.0, -1.0] * 30) > 0.9


def test_pairs_only_shared_documents() -> None:
    dense = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}
    other = {"a": 1.0, "b": 0.0, "c": 0.0, "e": 1.0}
    difference = paired_difference("t", "acc", dense, other)
    assert (difference.documents, difference.better, difference.worse) == (3, 0, 1)
    assert difference.difference == pytest.approx(-1 / 3)
    assert difference.standard_error == pytest.approx(1 / 3)
    assert (difference.p_value, difference.test) == (1.0, "McNemar, exact")
    graded = paired_difference("t", "f1", {"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.75})
    assert (graded.test, graded.p_value) == ("sign-flip permutation", pytest.approx(0.5))
    with pytest.raises(ValueError, match="no document in common"):
        paired_difference("t", "acc", {"a": 1.0}, {"b": 1.0})
