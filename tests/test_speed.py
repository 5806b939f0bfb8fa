"""Speed: timings with rivals, verdicts, and loading that honours them without touching a tensor."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfweight
from artifacts import IDS, assert_same, stored
from commands import Cli, ok, one_line, weights
from halfweight.eval import layer_speed, modelled_speed, speed
from halfweight.eval.timing import Spread
from halfweight.serving import storage, verdicts
from halfweight.serving.int4 import as_int4, exact_int4, rounded_int4
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import IntegerScheme, LinearScheme, LowRankScheme
from halfweight.serving.verdicts import Entry, Verdict, Verdicts
from halfweight.triton_kernels import cost, survey, trust
from test_storage import SCHEMES, K, N, module, packed

CPU = torch.device("cpu")
EXACT = ["int4 asymmetric", "int4 symmetric", "2:4 int4", "4:8 int4", "1x8", "1x16", "1x8 layer"]


# --- dense int4 with the same numbers ---


@pytest.mark.parametrize("name", EXACT)
def test_int4_forms_hold_the_same_numbers(name: str) -> None:
    scheme = SCHEMES[name]
    tensors, want = packed(scheme)
    target = exact_int4(scheme)
    assert target is not None
    converted = as_int4(scheme, tensors, (N, K))
    storage.validate(target.dense, converted, (N, K))
    assert torch.equal(storage.dense_weight(target.dense, converted, (N, K), torch.float32), want)


@pytest.mark.parametrize("name", ["2:4", "int8", "2:4 int8"])
def test_other_numbers_have_no_exact_int4_form(name: str) -> None:
    assert exact_int4(SCHEMES[name]) is None
    with pytest.raises(ValueError, match="no exact dense int4"):
        as_int4(SCHEMES[name], packed(SCHEMES[name])[0], (N, K))


def test_rounding_for_the_stop_watch_is_within_half_a_step() -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    scheme = IntegerScheme(bits=4, group_size=16, symmetric=True).dense
    got = storage.dense_weight(scheme, rounded_int4(weight, 16), (8, 40), torch.float32)
    steps = nn.functional.pad(weight, (0, 8)).unflatten(1, (3, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16) / 7
    assert bool(((got - weight).abs() <= 0.501 * steps.flatten(1)[:, :40]).all())


# --- judging ---


def test_a_verdict_needs_a_margin() -> None:
    assert layer_speed.decide("sparse", {"sparse": 10.0, "dense": 20.0}) == ("sparse", "2.00x as fast as dense")
    assert layer_speed.decide("sparse", {"sparse": 10.0, "dense": 9.9})[0] == "sparse"
    assert layer_speed.decide("sparse", {"sparse": 10.0, "dense": 5.0}) == ("dense", "2.00x as fast as sparse")
    assert layer_speed.decide("sparse", {"sparse": 10.0, "int4": 4.0, "dense": 5.0})[0] == "int4"


def test_int4_is_a_verdict_only_where_it_is_exact() -> None:
    times = {name: Spread.of([taken]) for name, taken in (("compressed", 10.0), ("int4", 2.0), ("dense", 20.0))}
    judged = {
        name: layer_speed.judge(("op", SCHEMES[name], (N, K)), ["a"], 1, "float32", times, "measured")
        for name in ("2:4", "2:4 int4")
    }
    assert judged["2:4 int4"].verdict == "int4"
    assert judged["2:4"].verdict == "sparse"
    assert judged["2:4"].reason == "2.00x as fast as dense; int4 would be 5.00x faster, with other weights"


def test_buckets_are_powers_of_two() -> None:
    assert [verdicts.bucket(tokens) for tokens in (1, 2, 3, 4, 5, 16, 17, 64, 65, 5000)] == [
        *(1, 2, 4, 4, 8, 16, 32, 64, 64, 64)
    ]


# --- verdicts.json ---


def entry_for(folder: Path, choice: str, tokens: int = 1, **changes: Any) -> Entry:
    """One verdict for every kind of linear of the artifact, on this machine in fp32."""
    model = halfweight.load(folder, verdicts=False)
    linears = [
        Verdict(op=op, scheme=scheme, shape=shape, choice=choice, microseconds={})  # type: ignore[arg-type]
        for op, scheme, shape in layer_speed.kinds_of(model)
    ]
    fields = {"device": verdicts.device_name(CPU), "dtype": "float32", "tokens": tokens, "linears": linears}
    return Entry(**{**fields, **changes})


@pytest.fixture
def own(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the 2:4 artifact to write verdicts into."""
    import shutil

    return Path(shutil.copytree(artifact, tmp_path / "own"))


def test_a_dense_verdict_expands_the_same_weights(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = halfweight.load(own)
    want, tensors = plain(IDS).logits, plain.state_dict()
    before = weights(own)
    verdicts.write(own, [entry_for(own, "dense")])
    with caplog.at_level(logging.WARNING, "halfweight"):
        model = halfweight.load(own)
    assert weights(own) == before
    expanded = sum(m.shape[0] * m.shape[1] * 4 for m in model.modules() if isinstance(m, CompressedLinear))
    assert f"14 linears as dense, {expanded / 1e6:.1f} MB of memory more" in caplog.text
    torch.testing.assert_close(model(IDS).logits, want)
    assert {choice.backend for choice in halfweight.explain(model)} == {"dense"}
    assert_same(dict(copy.deepcopy(model).state_dict()), dict(tensors))
    torch.testing.assert_close(model(IDS).logits, want)  # and back again after the copy


def test_a_model_with_verdicts_saves_what_it_loaded(own: Path, tmp_path: Path) -> None:
    verdicts.write(own, [entry_for(own, "dense")])
    model = halfweight.load(own)
    model(IDS)
    model.save_pretrained(tmp_path / "saved")
    halfweight.load(tmp_path / "saved")
    names = [name for name in stored(own) if name.endswith("meta")]
    assert names
    for name in names:
        assert torch.equal(stored(tmp_path / "saved")[name], stored(own)[name])


def test_verdicts_hold_for_their_device_dtype_and_bucket_alone(own: Path) -> None:
    def backends(**options: Any) -> set[str]:
        return {choice.backend for choice in halfweight.warmup(halfweight.load(own, **options))}

    verdicts.write(own, [entry_for(own, "dense", tokens=4), entry_for(own, "dense", device="another")])
    assert backends() == {"cpu"}
    assert backends(batch_size=3) == {"dense"}
    assert backends(batch_size=3, dtype="bfloat16") == {"cpu"}
    assert backends(batch_size=3, verdicts=False) == {"cpu"}


def test_inspect_says_what_loading_does(own: Path) -> None:
    def seen(**where: Any) -> set[tuple[str | None, str | None]]:
        layers = halfweight.inspect_checkpoint(own, **where).layers
        return {(layer.backend, layer.form) for layer in layers if layer.pattern == "2:4"}

    verdicts.write(own, [entry_for(own, "dense")])
    assert seen(device="cpu") == {("dense", "dense")}
    assert seen(device="cpu", dtype="bfloat16") == {("cpu", None)}
    assert seen() == {(None, None)}
    verdicts.write(own, [entry_for(own, "int4")])  # 16-bit numbers are on no grid
    for read in (halfweight.load, lambda folder: halfweight.inspect_checkpoint(folder, device="cpu")):
        with pytest.raises(halfweight.InputError, match=r"verdicts\.json: \S+_proj: 2:4 .* cannot run as int4"):
            read(own)


def test_writing_merges(own: Path) -> None:
    verdicts.write(own, [entry_for(own, "dense"), entry_for(own, "dense", tokens=4)])
    verdicts.write(own, [entry_for(own, "sparse")])
    known = verdicts.read(own)
    assert known is not None
    assert [(e.tokens, e.linears[0].choice) for e in known.entries] == [(1, "sparse"), (4, "dense")]
    assert sorted(file.name for file in own.glob("verdicts*")) == ["verdicts.json"]


def test_bad_verdicts_are_one_line(own: Path) -> None:
    file = own / verdicts.FILE
    verdicts.write(own, [entry_for(own, "int4")])
    with pytest.raises(halfweight.InputError, match="2:4 16-bit cannot run as int4 without changing its numbers"):
        halfweight.load(own)
    for damage in ("{", '{"entries": 3}', '{"format_version": 2, "entries": []}'):
        file.write_text(damage, encoding="utf-8")
        with pytest.raises(halfweight.InputError, match=r"verdicts\.json: [^\n]+$"):
            halfweight.load(own)


def test_an_int4_verdict_runs_the_same_numbers() -> None:
    scheme = SCHEMES["1x8"]
    model = nn.Sequential(module(scheme, packed(scheme)[0])).float()
    linear = model[0]
    assert isinstance(linear, CompressedLinear)
    trust.forget()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    want, tensors = model(x), {name: tensor.clone() for name, tensor in linear.stored().items()}
    verdict = Verdict(op=linear.op, scheme=scheme, shape=(N, K), choice="int4", microseconds={"int4": 1, "sparse": 2})
    entry = Entry(device="d", dtype="float32", tokens=1, linears=[verdict])
    applied = verdicts.apply(model, entry, torch.float32, "here")
    torch.testing.assert_close(model(x), want)
    prepared = linear.implementation()
    assert prepared is not None and prepared.reason == "int4 kernels; verdict: int4, measured 1 us against 2"
    assert (applied.int4, applied.dense) == (1, 0)
    (choice,) = halfweight.warmup(model, (1, 3), torch.float32)
    assert (choice.backend, choice.reason) == (prepared.backend, prepared.reason)
    assert trust.may_run("int4.cpu", CPU, inline_asm=True) == (True, "")  # the kernels that run were the ones checked
    assert_same(linear.stored(), tensors)


def test_a_dense_form_has_its_branch_inside() -> None:
    scheme = LinearScheme(pattern="2:4", density=0.5, low_rank=LowRankScheme(rank=2))
    linear = CompressedLinear(scheme, 16, 8, True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([True, False, True, False]).repeat(8, 4)
    tensors = storage.pack_weight(torch.randn(8, 16, generator=generator) * mask, scheme)
    tensors |= {"V": torch.randn(1, 16, 2, generator=generator), "U": torch.randn(8, 2, generator=generator)}
    linear.load_state_dict({**tensors, "bias": torch.randn(8, generator=generator)})
    x = torch.randn(3, 16, generator=generator)
    want = linear(x)
    linear.stored()
    verdicts.use_dense(linear, "test")
    torch.testing.assert_close(linear(x), want)
    prepared = linear.implementation()
    assert prepared is not None and prepared.backend == "dense"


# --- bench ---


def small_bench(folder: Path, dense: Path | None = None) -> speed.Speed:
    return speed.bench(folder, dense, batches=(1, 2), prompt=4, new=2, rounds=1, dtypes=("float32",), threads=(1,))


def test_bench_times_the_artifact_beside_its_rivals(artifact: Path, llama: Path) -> None:
    result = small_bench(artifact, llama)
    assert {(row.model, row.batch) for row in result.models} == {
        (model, batch) for model in ("compressed", "dense", "int4") for batch in (1, 2)
    }
    for row in result.models:
        assert row.decode.low <= row.decode.median <= row.decode.high
        assert row.memory_bytes >= row.weight_bytes > 0
        if row.model == "dense":
            assert row.ratio_to_dense == pytest.approx(1)
    by_name = {row.model: row.weight_bytes for row in result.models}
    assert by_name["int4"] < by_name["compressed"] < by_name["dense"]
    assert {kernel.backend for kernel in result.kernels} == {"cpu"}
    assert sum(kernel.count for kernel in result.kernels) == 14
    assert {layer.tokens for layer in result.layers} == {1, 2, 4}
    assert {layer.evidence for layer in result.layers} == {"measured"}
    assert not any(layer.int4_exact for layer in result.layers)


def test_rounds_that_differ_much_are_said_to(artifact: Path) -> None:
    result = small_bench(artifact)
    steady, wide = (Spread(median=10, low=low, high=11, count=3) for low in (9.0, 2.0))
    rows = [row.model_copy(update={"decode": steady}) for row in result.models]
    assert result.model_copy(update={"models": rows}).unsteady == ""
    rows[0] = rows[0].model_copy(update={"decode": wide})
    assert "differ by up to 5.5x" in result.model_copy(update={"models": rows}).unsteady


def test_without_a_dense_model_the_rival_has_the_same_weights(artifact: Path) -> None:
    from halfweight.eval import rivals

    own = rivals.compressed(artifact, CPU, torch.float32)
    expanded = rivals.dense(artifact, None, CPU, torch.float32)
    torch.testing.assert_close(expanded.model(IDS).logits, own.model(IDS).logits)
    assert not any(isinstance(m, CompressedLinear) for m in expanded.model.modules())


def test_a_tied_table_is_timed_as_the_head_that_it_is(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    dense = make_model("llama", tie_word_embeddings=True)
    settings = {"calibration": {"data": str(text_file), "samples": 2, "seqlen": 32}, "embeddings": {"bits": 8}}
    recipe = {"name": "tied", **settings, "stages": [{"pass": "rtn", "bits": 4, "group_size": 32}]}
    out = tmp_path / "tied"
    halfweight.compress_checkpoint(dense, halfweight.Recipe.parse(recipe), out)
    result = small_bench(out, dense)
    assert result.int4 == "the artifact is dense int4 itself"
    assert {row.model for row in result.models} == {"compressed", "dense"}
    table = next(layer for layer in result.layers if layer.op == "tied")
    assert (table.own, table.shape, table.example) == ("int8", (64, 32), "model.embed_tokens")
    assert set(table.times) == {"int8", "dense"}
    verdicts.write(out, [entry_for(out, "dense")])
    torch.testing.assert_close(halfweight.load(out)(IDS).logits, halfweight.load(out, verdicts=False)(IDS).logits)


def test_bytes_are_those_of_the_form_that_runs(artifact: Path) -> None:
    from halfweight.eval import rivals

    dense, stored = (rivals.compressed(artifact, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    numbers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)  # of the linears
    others = 2 * 64 * 32 + 5 * 32  # embedding, head and norms
    buffers = sum(b.numel() * 4 for n, b in dense.model.named_buffers() if "inv_freq" in n)
    assert dense.weights == numbers * 9 // 8 + 4 * others + buffers  # 2:4 values that are bf16 numbers stay so
    assert stored.weights == numbers * 9 // 8 + 2 * others + buffers
    assert dense.weights - dense.read == 64 * 32 * 4


def test_another_dense_model_is_refused(artifact: Path, make_model: Callable[..., Path]) -> None:
    with pytest.raises(halfweight.InputError, match="name the model it was made from"):
        small_bench(artifact, make_model("gpt_neox"))


def test_modelled_verdicts_say_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(cases: Any, gpu: cost.GPU, cache: Path | None) -> Any:
        assert cache is None
        numbers = {"two_four": 3.0, "int4": 2.0}
        for case in cases:
            microseconds = {"microseconds": numbers[case.op]}
            yield case, survey.Facts(("k",), 1, 1, True, 1, 0, 1, 1, 1.0, bound="dram", **microseconds)

    monkeypatch.setattr(survey, "facts", facts)
    result = modelled_speed.model_layers(artifact, "h100", (1,), None)
    assert result.times == "modelled" and result.device == "H100 SXM"
    dense = cost.stream_microseconds(cost.GPUS["h100"], 2 * (32 * 32 + 64))
    first = next(layer for layer in result.layers if layer.shape == (32, 32))
    assert first.evidence == "modelled" and first.times["sparse"].median == 3.0
    assert first.times["dense"].median == pytest.approx(dense)
    assert first.verdict == ("sparse" if dense * layer_speed.MARGIN >= 3.0 else "dense")


def test_the_verb_applies_verdicts_beside_the_tensors(own: Path, cli: Cli, tmp_path: Path) -> None:
    before = weights(own)
    flags = ("--batch", 1, "--prompt", 4, "--new", 2, "--rounds", 1, "--dtypes", "float32")
    result = ok(cli("bench", own, *flags, "--apply", "--json", tmp_path / "bench.json"))
    assert "two_four kernels" in result.out and "measured" in result.out
    assert weights(own) == before
    known = Verdicts.model_validate_json((own / verdicts.FILE).read_text(encoding="utf-8"))
    assert {(e.device, e.dtype, e.tokens) for e in known.entries} == {
        (verdicts.device_name(CPU), "float32", tokens) for tokens in (1, 4)
    }
    assert speed.Speed.model_validate(json.loads((tmp_path / "bench.json").read_text())).folder == str(own)
    halfweight.load(own)


def test_bad_input_is_one_line(artifact: Path, llama: Path, cli: Cli) -> None:
    assert "is not a list of positive numbers" in one_line(cli("bench", artifact, "--batch", "1,x"))
    assert "a dense checkpoint" in one_line(cli("bench", llama))
    assert "exceed the model's context of 128" in one_line(cli("bench", artifact, "--prompt", 100, "--new", 100))
    assert "choose from a100" in one_line(cli("bench", artifact, "--gpu", "h1000"))
    assert "--apply keeps only what was measured" in one_line(cli("bench", artifact, "--gpu", "h100", "--apply"))
    short = ("--prompt", 2, "--new", 2)
    assert "dtype 'float8' is unknown" in one_line(cli("bench", artifact, *short, "--dtypes", "float8"))
