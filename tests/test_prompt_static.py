"""Inputs that a prompt chooses, in whole models: serving with a KV cache, honest scoring, runs, bad input."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import halfweight
from commands import Cli, load_script
from halfweight import InputError, Recipe, compress_checkpoint
from halfweight.compress.calibration import load_windows
from halfweight.compress.plan import plan
from halfweight.eval.compare import compare
from halfweight.eval.perplexity import evaluate, window_losses
from halfweight.eval.selection import selecting_tokens
from halfweight.eval.tasks import evaluate_tasks
from halfweight.eval.text import exact_windows, read_text, tokenize
from halfweight.serving import verdicts
from halfweight.serving.errors import RunError
from halfweight.serving.linear import core_inputs
from halfweight.serving.load import load_tokenizer
from halfweight.triton_kernels.formats.bits import from_bits
from recipe_cases import refusal, stages
from runs import contents, interrupt, stop_in_block
from test_core_inputs import chosen_by

IDS = torch.arange(3, 27)[None]
A, B = IDS[:, :9] % 23 + 3, IDS[:, 5:20] % 7 + 3


def recipe(text: Path, **settings: Any) -> Recipe:
    stage = {"pass": "keep", "selection": {"sparsity": 0.5, "threshold": "prompt", **settings}}
    return Recipe.parse({"calibration": {"data": str(text), "samples": 8, "seqlen": 32}, "stages": [stage]})


@pytest.fixture(scope="module")
def static(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with |x| times norm and branches."""
    out = tmp_path_factory.mktemp("static") / "out"
    compress_checkpoint(llama, recipe(text_file, score="l2", channels=0.8), out)
    return out


@pytest.fixture(scope="module")
def loaded(static: Path) -> Any:
    return halfweight.load(static, dtype="float32")


class Plain:
    """The dense model in fp32, with hooks that do by definition what the stored tensors say."""

    def __init__(self, dense: Path, tensors: dict[str, Tensor]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        self.seen: dict[str, list[Tensor]] = {}
        self.cores: dict[str, list[int]] = {}
        self.prompt = True
        self.votes: Tensor | None = None  # bool [B, T], which tokens of the prompt vote
        for name, linear in self.model.named_modules():
            if f"{name}.counts" in tensors:
                linear.register_forward_hook(self._hook(name, tensors))

    def _hook(self, name: str, tensors: dict[str, Tensor]) -> Any:
        norms, count = from_bits(tensors[f"{name}.norms"])[0], int(tensors[f"{name}.counts"])
        v, u = tensors[f"{name}.V"][0].float(), tensors[f"{name}.U"].float()

        def select(module: nn.Linear, args: tuple[Tensor], y: Tensor) -> Tensor:
            (x,) = args
            if self.prompt:
                rows = x.flatten(0, 1) if self.votes is None else x[self.votes]
                self.seen.setdefault(name, []).append(rows)
                return y
            if name not in self.cores:
                self.cores[name] = chosen_by(torch.cat(self.seen[name]), norms, count)
            read = torch.zeros(x.shape[-1])
            read[self.cores[name]] = 1
            return (x * read) @ module.weight.T + (x * (1 - read)) @ v @ u.T

        return select

    @torch.no_grad()
    def read(self, prompt: Tensor, cache: Any = None, **inputs: Any) -> Any:
        """The model's output for a prompt, the first one or a further one behind the `cache`."""
        self.seen, self.cores, self.prompt = self.seen if cache else {}, {}, True
        out = self.model(prompt, past_key_values=cache, use_cache=True, **inputs)
        self.prompt = False
        return out

    def run(self, prompt: Tensor, new: Tensor, **inputs: Any) -> Tensor:
        """Logits `[B, T, V]` of the tokens `new` `[B, T]`, one by one behind a `prompt`."""
        return one_by_one(self.model, self.read(prompt, **inputs).past_key_values, new)


def one_by_one(model: Any, cache: Any, new: Tensor) -> Tensor:
    """Logits `[B, T, V]` of the tokens `new` `[B, T]`, each in a forward pass of its own behind the `cache`."""
    with torch.no_grad():
        steps = [model(ids, past_key_values=cache, use_cache=True).logits for ids in new.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def decode(model: Any, prompts: Sequence[Tensor], new: Tensor) -> Tensor:
    """As `Plain.run`, by the compressed model."""
    cache = None
    with torch.no_grad():
        for ids in prompts:
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
    return one_by_one(model, cache, new)


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def cores_of(model: Any) -> list[list[int]]:
    return [core.core.tolist() for core in core_inputs(model) if core.core is not None]


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# --- serving -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_in_full_and_decoding_reads_its_core(loaded: Any, llama: Path) -> None:
    plain = Plain(llama, tensors_of(loaded))
    new = IDS[:, 10:16]
    with torch.no_grad():
        same(loaded(A).logits, plain.model(A).logits)
    got, cores = decode(loaded, [A], new), cores_of(loaded)
    same(got, plain.run(A, new))
    assert cores == list(plain.cores.values()) and len(cores) == 14
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert float((got - decode(whole, [A], new)).abs().max()) > 1e-2


def test_decoding_depends_on_the_prompt_and_a_new_one_starts_anew(loaded: Any, static: Path, llama: Path) -> None:
    new = IDS[:, 10:13]
    first, cores = decode(loaded, [A], new), cores_of(loaded)
    second = decode(loaded, [B], new)
    assert cores_of(loaded) != cores
    same(second, decode(halfweight.load(static, dtype="float32"), [B], new))
    same(second, Plain(llama, tensors_of(loaded)).run(B, new))
    assert torch.equal(decode(loaded, [A], new), first)
    with torch.no_grad():  # arguments by position say the same
        cache = loaded(B).past_key_values
        same(loaded(new[:, :1], None, None, cache).logits, second[:, :1])
    assert cores_of(loaded) != cores


def test_a_prompt_in_chunks_is_one_prompt(loaded: Any) -> None:
    new = IDS[:, 10:13]
    whole, cores = decode(loaded, [B], new), cores_of(loaded)
    same(decode(loaded, B.split([6, 7, 2], dim=1), new), whole)
    assert cores_of(loaded) == cores
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(B)}
    at_once = loaded.generate(B, **options)
    assert torch.equal(loaded.generate(B, prefill_chunk_size=5, **options), at_once)
    steps = decode(loaded, [B], at_once[:, B.shape[1] : -1])
    assert torch.equal(steps.argmax(-1), at_once[:, B.shape[1] + 1 :])


def test_the_next_turn_counts_on_and_chooses_again(loaded: Any, llama: Path) -> None:
    plain, replies = Plain(llama, tensors_of(loaded)), (IDS[:, 10:13], IDS[:, 13:15])
    with torch.inference_mode():
        first = loaded(A, use_cache=True)
    got = [one_by_one(loaded, first.past_key_values, replies[0])]
    before = cores_of(loaded)
    with torch.no_grad():
        turn = loaded(B, past_key_values=first.past_key_values, use_cache=True)
    got.append(one_by_one(loaded, turn.past_key_values, replies[1]))
    assert cores_of(loaded) != before
    cache = plain.read(A).past_key_values
    same(got[0], one_by_one(plain.model, cache, replies[0]))
    same(turn.logits, plain.read(B, cache).logits)
    same(got[1], one_by_one(plain.model, cache, replies[1]))
    assert cores_of(loaded) == list(plain.cores.values())


def test_a_prompt_of_one_token_is_read_in_full(loaded: Any, llama: Path) -> None:
    plain, one, new = Plain(llama, tensors_of(loaded)), IDS[:, 4:5], IDS[:, 10:13]
    decode(loaded, [B], new)  # what it chose does not matter
    with torch.no_grad():
        same(loaded(one, use_cache=True).logits, plain.model(one).logits)
    same(decode(loaded, [one], new), plain.run(one, new))


def test_a_batch_has_one_core_and_its_padding_no_vote(loaded: Any, llama: Path) -> None:
    plain, new = Plain(llama, tensors_of(loaded)), IDS[:, 10:12].repeat(2, 1)
    batch = torch.cat((A, torch.cat((torch.full_like(A[:, :4], 2), A[:, :5]), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    with torch.no_grad():
        cache = loaded(batch, attention_mask=mask, use_cache=True).past_key_values
        loaded(new[:, :1], past_key_values=cache, attention_mask=torch.cat((mask, mask[:, -1:]), dim=1))
    got = cores_of(loaded)
    plain.votes = mask.bool()
    plain.run(batch, new, attention_mask=mask)
    assert got == list(plain.cores.values())
    plain.votes = None
    plain.run(batch, new, attention_mask=mask)
    assert got != list(plain.cores.values())


def test_sequences_that_take_turns_are_refused(loaded: Any) -> None:
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for cache, ids in zip(caches, (A, B), strict=True):
            loaded(ids, past_key_values=cache)
        want = loaded(IDS[:, :1], past_key_values=caches[1]).logits
        with pytest.raises(RunError, match="this KV cache is not that of the last forward pass"):
            loaded(IDS[:, :1], past_key_values=caches[0])
    same(want, decode(loaded, [B], IDS[:, :1]))


def test_a_copy_counts_for_itself_and_saving_loses_nothing(loaded: Any, tmp_path: Path) -> None:
    new = IDS[:, 10:13]
    twin = copy.deepcopy(loaded)
    want = decode(loaded, [A], new)
    decode(twin, [B], new)
    assert cores_of(twin) != cores_of(loaded)
    same(decode(twin, [A], new), want)
    twin.save_pretrained(tmp_path / "again")
    same(decode(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32), [A], new), want)


def test_a_dense_verdict_leaves_it_alone(loaded: Any) -> None:
    want = decode(loaded, [A], IDS[:, 10:12])
    kinds = {(m.op, m.scheme, m.shape) for m in loaded.modules() if hasattr(m, "scheme")}
    dense = [
        verdicts.Verdict(op=op, scheme=scheme, shape=shape, choice="dense", microseconds={})
        for op, scheme, shape in kinds
    ]
    entry = verdicts.Entry(device="any", dtype="float32", tokens=1, linears=dense)
    assert verdicts.apply(loaded, entry, torch.float32, "verdicts.json") == verdicts.Applied()
    assert torch.equal(decode(loaded, [A], IDS[:, 10:12]), want)


# --- scoring -------------------------------------------------------------------------------------------------------


def test_a_window_is_scored_as_it_is_decoded(loaded: Any, static: Path, llama: Path, text_file: Path) -> None:
    result = evaluate(static, text_file, windows=3, seqlen=40, dtype="float32")
    assert (result.prompt_tokens, result.sparse_tokens, result.tokens) == (10, 0.75, 3 * 29)
    assert result.bytes_read_fraction is not None and abs(result.bytes_read_fraction - 0.5) < 0.03
    losses = []
    for window in exact_windows(tokenize(load_tokenizer(static), read_text(text_file)), 40, None, 3):
        logits = decode(loaded, [window[None, :10]], window[None, 10:-1])
        losses.append(nn.functional.cross_entropy(logits[0], window[11:], reduction="none"))
    assert result.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    dense = evaluate(llama, text_file, windows=3, seqlen=40, dtype="float32", prompt_tokens=10)
    assert (dense.tokens, dense.prompt_tokens, dense.sparse_tokens) == (result.tokens, 10, None)
    assert dense.perplexity != pytest.approx(result.perplexity, rel=1e-3)


def test_eval_says_what_was_a_prompt(static: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "eval.json"
    done = cli("eval", static, "--text", text_file, "--windows", 2, "--seqlen", 40, "--prompt-tokens", 7, "--json", out)
    assert done.code == 0 and "the first 7 tokens of a window" in " ".join(done.out.split())
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert (saved["prompt_tokens"], saved["sparse_tokens"], saved["tokens"]) == (7, 1 - 7 / 40, 2 * 32)
    done = cli("eval", static, "--text", text_file, "--seqlen", 40, "--prompt-tokens", 39)
    assert done.code == 2 and "--prompt-tokens 39: windows of 40 tokens allow 1 to 38" in " ".join(done.err.split())


def test_a_report_is_of_what_follows_prompts(llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file)
    report = compress_checkpoint(llama, settings, tmp_path / "out", dtype="float32")
    dev = load_windows(settings.calibration, load_tokenizer(llama), llama).dev
    for folder, got in ((llama, report.dev.dense), (tmp_path / "out", report.dev.compressed)):
        model = halfweight.load(folder, dtype="float32")
        with selecting_tokens(model, 8):
            losses = [window_losses(model, window)[8:] for window in dev]
        assert got == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    assert report.dev.tokens == sum(len(window) - 1 - 8 for window in dev)


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        {"pass": "keep"},
        {"pass": "gptq", "bits": 4, "group_size": 16, "along": "outputs"},
        {"pass": "gqsa", "pattern": "8x1", "density": 0.5},
    ],
    ids=lambda stage: str(stage["pass"]),
)
def test_what_is_stored_is_what_top_k_stores(
    stage: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = {"data": str(text_file), "samples": 4, "seqlen": 32}
    found = {}
    for threshold in ("topk", "prompt"):
        selection = {"sparsity": 0.4, "score": "l2", "channels": 0.8, "threshold": threshold}
        settings = Recipe.parse({"calibration": calibration, "stages": [{**stage, "selection": selection}]})
        report = compress_checkpoint(llama, settings, tmp_path / threshold, dtype="float32")
        inspection = halfweight.inspect_checkpoint(tmp_path / threshold, device="cpu", dtype="float32")
        planned = plan(llama, settings)
        bits = planned.effective_bits
        assert bits == pytest.approx(report.effective_bits) == pytest.approx(inspection.effective_bits)
        found[threshold] = (bits, tensors_of(halfweight.load(tmp_path / threshold, dtype="float32")))
    assert found["topk"][0] == found["prompt"][0]
    assert all(torch.equal(tensor, found["topk"][1][name]) for name, tensor in found["prompt"][1].items())
    assert {layer.backend for layer in inspection.layers} == {"torch"}
    assert "core inputs by |x| norm" in inspection.layers[0].numbers
    decode(halfweight.load(tmp_path / "prompt", dtype="float32"), [A], IDS[:, 10:12])


def test_a_run_resumes_to_the_same_bytes(static: Path, llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, score="l2", channels=0.8)
    interrupt(llama, settings, tmp_path / "out", stop_in_block(1))
    assert compress_checkpoint(llama, settings, tmp_path / "out").blocks_resumed == 1
    assert contents(tmp_path / "out") == contents(static)


def test_the_script_compares_ways_to_choose(static: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    given = ["--text", text_file, "--windows", 3, "--seqlen", 40, "--prompt-tokens", 8, "--dtype", "float32"]
    load_script("prompt_static").main([str(static), *map(str, given), "--json", str(out)])
    check = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["chosen_by"]: row for row in check["rows"]}
    assert list(rows) == ["nothing", "each token", "its prompt", "another prompt", "chance"]
    own = evaluate(static, text_file, windows=3, seqlen=40, dtype="float32", prompt_tokens=8)
    assert rows["its prompt"]["perplexity"] == pytest.approx(own.perplexity, rel=1e-6)
    assert check["tokens"] == own.tokens == 3 * 31
    for row in rows.values():
        assert len(row["parts"]) == 4
        logs = [math.log(part) for part in row["parts"]]
        sizes = [8, 8, 8, 7]
        assert sum(s * v for s, v in zip(sizes, logs, strict=True)) / 31 == pytest.approx(math.log(row["perplexity"]))
    read = [row["bytes_read_fraction"] for row in rows.values()]
    assert read[0] is None and read[1:] == pytest.approx([own.bytes_read_fraction] * 4)
    assert len({round(row["perplexity"], 6) for row in rows.values()}) == 5


# --- bad input -----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"truncation": 0.1, "score": "l2", "sparsity": 0},
        "truncation finds one threshold per linear, not threshold: prompt",
    ),
    ({"threshold": "prompts"}, "selection.threshold"),
    ({"score": "l2", "sparsity": 0.99}, "sparsity 0.99 leaves no bytes for inputs"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_refused_in_one_line(
    settings: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        compress_checkpoint(llama, recipe(text_file, **settings), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_does_not_combine_is_refused(
    static: Path, llama: Path, text_file: Path, tmp_path: Path, make_model: Any
) -> None:
    core = {"pass": "keep", "selection": {"sparsity": 0.5, "threshold": "prompt"}}
    topk = {"pass": "keep", "selection": {"sparsity": 0.5, "threshold": "topk"}, "targets": ["v_proj"]}
    message = refusal(stages({**core, "targets": ["q_proj", "k_proj"]}, topk))
    assert "q_proj, k_proj, v_proj are fused by servers and must share one scheme" in message
    searched = recipe(text_file, channels=0.9).with_search("random")
    with pytest.raises(InputError, match=r"selection\.threshold is not searched"):
        compress_checkpoint(llama, searched, tmp_path / "out")
    with pytest.raises(InputError, match=r"of an expert, which cannot select its inputs yet"):
        compress_checkpoint(make_model("mixtral"), recipe(text_file), tmp_path / "out")
    short = recipe(text_file).with_calibration(seqlen=2)
    with pytest.raises(InputError, match="threshold: prompt needs windows of 3 tokens or more"):
        compress_checkpoint(llama, short, tmp_path / "out")
    for refused in (
        lambda: compare(llama, [static], text=text_file, windows=2, seqlen=40),
        lambda: evaluate_tasks(static, ["none"], tmp_path / "tasks"),
    ):
        with pytest.raises(
            InputError, match="a prompt choose the inputs, which tasks and comparisons do not tell from"
        ):
            refused()
    with pytest.raises(InputError, match="backend 'cpu' cannot run it"):
        halfweight.load(static, backend="cpu")
    needed = pytest.raises(InputError, match="threshold: prompt needs a prompt of one token or more")
    with needed, selecting_tokens(halfweight.load(static), 0):
        pass
