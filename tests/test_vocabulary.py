"""Quantized embeddings and heads: tied, untied and scaled ones, written, loaded, saved again, counted and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfweight
from halfweight import InputError, Recipe, RunError, compress_checkpoint
from halfweight.compress.passes.quantization import CodeRange, quantize
from halfweight.compress.plan import plan
from halfweight.compress.report import Progress
from halfweight.compress.vocabulary import PART, quantize_table
from halfweight.serving.checkpoint import Checkpoint
from halfweight.serving.embedding import CompressedEmbedding, TiedHead
from halfweight.serving.inspect import inspect_checkpoint
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import IntegerScheme
from halfweight.serving.tables import Table
from halfweight.serving.warmup import warmup
from halfweight.triton_kernels import dispatch, trust
from halfweight.triton_kernels.cpu import layouts
from halfweight.triton_kernels.formats import integers
from halfweight.triton_kernels.formats.integers import Integers
from runs import contents

IDS = torch.arange(3, 27)[None]
EMBED = "model.embed_tokens"
TIED = {"qwen2": EMBED, "gemma3_text": EMBED, "opt": "model.decoder.embed_tokens"}
UNTIED = {"llama": EMBED, "gpt_neox": "gpt_neox.embed_in", "phi3": EMBED}
Make = Callable[..., Path]


def recipe_for(text_file: Path, embeddings: dict[str, Any] | None, **stage: Any) -> Recipe:
    stages = [stage or {"pass": "wanda", "pattern": "2:4"}]
    calibration = {"data": str(text_file), "samples": 8, "seqlen": 32}
    return Recipe.parse({"name": "small", "calibration": calibration, "embeddings": embeddings, "stages": stages})


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> Recipe:
    return recipe_for(text_file, {"bits": 8, "group_size": 16})


@pytest.fixture(scope="module")
def tied(make_model: Make, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma: tied, and its embeddings are scaled."""
    out = tmp_path_factory.mktemp("tied") / "out"
    compress_checkpoint(make_model("gemma3_text"), recipe, out)
    return out


@pytest.fixture(scope="module")
def untied(llama: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("untied") / "out"
    compress_checkpoint(llama, recipe, out)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def table_of(tensors: dict[str, Tensor], name: str, columns: int) -> Tensor:
    packed = Integers(*(tensors.get(f"{name}.{suffix}") for suffix in Integers._fields))  # type: ignore[arg-type]
    return integers.dequantize(packed, bits=8, group_size=16, columns=columns)


# --- what is written computes what it says -------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*TIED, *UNTIED])
def test_both_loaders_equal_the_dense_model_with_the_rounded_tables(
    architecture: str, make_model: Make, recipe: Recipe, tmp_path: Path
) -> None:
    name, out = (TIED | UNTIED)[architecture], tmp_path / "out"
    report = compress_checkpoint(make_model(architecture), recipe, out)
    tensors = tensors_of(out)
    dense = AutoModelForCausalLM.from_pretrained(make_model(architecture), dtype=torch.float32).eval()
    loaded = halfweight.load(out, dtype="float32")
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    artifact = Checkpoint(out).artifact
    assert artifact is not None and artifact.embedding is not None
    for linear in [key for key in artifact.linears if key != "lm_head"]:
        dense.get_submodule(linear).weight.data.copy_(loaded.get_submodule(linear).dense_weight())
    table = dense.get_input_embeddings().weight.requires_grad_(False)
    rounded = table_of(tensors, name, table.shape[1])
    assert 0 < float((rounded - table).norm() / table.norm()) < 0.01
    table.data.copy_(rounded)
    if architecture in TIED:
        assert not [key for key in tensors if key.startswith("lm_head")], "one module, one set of tensors"
        assert [layer.name for layer in report.tables] == [name]
    else:
        head = table_of(tensors, "lm_head", table.shape[1])
        dense.get_output_embeddings().weight.data.copy_(head)
        assert [layer.name for layer in report.tables] == [name, "lm_head"]
    with torch.no_grad():
        logits = loaded(IDS).logits
        assert torch.equal(logits, reloaded(IDS).logits)
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_modules_are_what_they_should_be(tied: Path, untied: Path) -> None:
    model = halfweight.load(tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, CompressedEmbedding) and isinstance(head, TiedHead)
    assert head._embedding[0] is embedding and not head.state_dict()
    assert embedding.factor == 32**0.5
    model = halfweight.load(untied)
    assert isinstance(model.get_output_embeddings(), CompressedLinear)
    model.tie_weights()  # transformers calls this at odd times; there is nothing left to tie
    assert isinstance(halfweight.load(tied).get_output_embeddings(), TiedHead)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_int8_tables_cost_next_to_nothing(
    kind: str, make_model: Make, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    dense = make_model("qwen2") if kind == "tied" else llama
    recipe = recipe_for(text_file, {"group_size": 16}, **{"pass": "rtn", "bits": 8, "group_size": 16})
    report = compress_checkpoint(dense, recipe, tmp_path / "out", dtype="float32")
    assert report.dev.compressed == pytest.approx(report.dev.dense, rel=0.02)
    found = halfweight.evaluate(tmp_path / "out", text_file, windows=4, seqlen=32).perplexity
    assert found == pytest.approx(halfweight.evaluate(dense, text_file, windows=4, seqlen=32).perplexity, rel=0.02)
    assert all(0 < table.error < 1e-4 for table in report.tables)


@pytest.mark.parametrize("settings", [{"bits": 4, "group_size": 8}, {"bits": 4, "group_size": 64, "symmetric": True}])
def test_int4_tables_load_too(settings: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = compress_checkpoint(llama, recipe_for(text_file, settings), tmp_path / "out")
    assert all(1e-4 < table.error < 0.05 for table in report.tables)
    halfweight.load(tmp_path / "out")(IDS)


def test_rounding_in_pieces_is_rounding_at_once(llama: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(llama)
    info = checkpoint.info(f"{EMBED}.weight")
    table = Table(EMBED, (64, 32), {"weight": info})
    assert recipe.embeddings is not None
    once = quantize_table(table, recipe.embeddings, torch.device("cpu"))
    monkeypatch.setattr("halfweight.compress.vocabulary._NUMBERS", 5 * 32)
    pieces = quantize_table(table, recipe.embeddings, torch.device("cpu"))
    assert pieces[0].error == pytest.approx(once[0].error)
    assert once[1].keys() == pieces[1].keys()
    assert all(torch.equal(once[1][name], pieces[1][name]) for name in once[1])


# --- saving, resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_saving_again_keeps_every_bit_of_the_tables(
    kind: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    model = halfweight.load(folder, dtype=dtype)
    with torch.no_grad():
        assert model(IDS).logits.dtype == getattr(torch, dtype)  # now the weights are in the kernels' layout
    model.to(torch.float16).to(torch.bfloat16).save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert set(before) == set(after)
    for name, tensor in before.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, after[name]), name
    with torch.no_grad():
        logits = [halfweight.load(path, dtype="float32")(IDS).logits for path in (folder, tmp_path / "again")]
    if dtype == "bfloat16":
        assert torch.equal(*logits)


def test_a_run_stopped_after_the_tables_resumes_to_the_same_bytes(
    llama: Path, untied: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: Progress) -> None:
        if step.stage == "blocks":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(llama, recipe, tmp_path / "out", progress=stop)
    assert (tmp_path / "out.partial" / PART).is_file()
    monkeypatch.setattr("halfweight.compress.vocabulary.quantize_tables", None)  # it must not be needed again
    compress_checkpoint(llama, recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(untied)
    assert PART not in contents(untied)


# --- counting ------------------------------------------------------------------------------------------------------


def test_bits_are_counted_and_planned(llama: Path, untied: Path, recipe: Recipe, tied: Path) -> None:
    found = inspect_checkpoint(untied, device="cpu")
    rows = {layer.name: layer for layer in found.layers}
    for name in (EMBED, "lm_head"):
        assert (rows[name].pattern, rows[name].numbers, rows[name].backend) == ("dense", "int8 g16", "cpu")
        assert rows[name].bits == 8 + (16 + 8) / 16
        assert 0.9 < rows[name].density <= 1 and rows[name].error is not None
    weights = sum(8 * tensor.nbytes for tensor in tensors_of(untied).values())
    dense = sum(tensor.numel() for tensor in tensors_of(llama).values())
    assert found.effective_bits_model == pytest.approx(weights / dense)
    assert found.effective_bits == 9.0
    planned = plan(llama, recipe)
    assert planned.effective_bits == pytest.approx(found.effective_bits)
    assert planned.effective_bits_model == pytest.approx(found.effective_bits_model)
    assert {layer.name: layer.bits_after for layer in planned.layers}["lm_head"] == rows["lm_head"].bits
    names = [layer.name for layer in inspect_checkpoint(tied).layers]
    assert EMBED in names and "lm_head" not in names


# --- the module ----------------------------------------------------------------------------------------------------


def random_module(bits: int = 8, dtype: torch.dtype = torch.float32) -> CompressedEmbedding:
    scheme = IntegerScheme(bits=bits, group_size=24)
    weight = torch.randn(37, 56, generator=torch.Generator().manual_seed(0))
    codes, _ = quantize(weight, None, CodeRange.of(bits, False), 24, 5)
    module = CompressedEmbedding(scheme.dense, 37, 56, dtype=dtype)
    for name, tensor in integers.pack(codes, bits=bits, group_size=24)._asdict().items():
        setattr(module, name, tensor)
    module.check()
    return module


@pytest.mark.parametrize("dtype", dispatch.TOLERANCE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_and_logits_are_those_of_the_dense_table(
    bits: int, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.SWITCH, backend)
    module = random_module(bits, dtype)
    dense, ids = module.dense_weight(), torch.tensor([[0, 36, 5], [5, 5, 17]])
    assert torch.equal(module(ids), dense[ids].to(dtype))
    assert module.implementation().backend == ("cpu" if backend == "auto" else "reference")  # type: ignore[union-attr]
    x = torch.randn(2, 3, 56).to(dtype)
    want = x.float() @ dense.T
    error = (TiedHead(module)(x).float() - want).norm() / want.norm()
    assert float(error) < dispatch.TOLERANCE[dtype]
    for bad in (-1, 37):
        with pytest.raises(IndexError):
            module(torch.tensor([bad]))


def test_warmup_checks_rows_and_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    trust.forget()
    model = torch.nn.Sequential(random_module())
    assert [choice.backend for choice in warmup(model, dtype=torch.float32)] == ["cpu"]
    right = layouts.LAYOUTS["tied"]
    wrong = right._replace(lookup=lambda *given: right.lookup(*given) * 1.01)  # type: ignore[misc]
    monkeypatch.setitem(layouts.LAYOUTS, "tied", wrong)
    (choice,) = warmup(torch.nn.Sequential(random_module()), dtype=torch.float32)
    trust.forget()
    assert choice.backend == "reference" and "tied.cpu disagrees" in choice.reason


def test_traces_in_one_graph() -> None:
    module, ids = random_module(), torch.tensor([3, 30])
    want = module(ids)
    compiled = torch.compile(lambda ids: module.logits(module(ids)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), module.logits(want))
    layout = layouts.LAYOUTS["tied"]
    form = layout.prepare(random_module()._weight())
    assert layout.lookup is not None
    operator = dispatch.lookup_operator_of("tied", type(form), layout.lookup)
    torch.library.opcheck(operator.default, (ids, *form, torch.float32))


# --- refusals ------------------------------------------------------------------------------------------------------

HEAD = {"pattern": "dense", "density": 1.0, "integers": {"bits": 8, "group_size": 16}}


def section(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        stored = load_file(file)
        change(stored)
        save_file(stored, file, {"format": "pt"})

    return damage


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tied head as a linear": (section(lambda c: c["linears"].update(lm_head=HEAD)), "tied"),
    "unknown key": (section(lambda c: c["embedding"].update(bogus=1)), "bogus"),
    "three bits": (section(lambda c: c["embedding"].update(bits=3)), "bits"),
    "odd groups": (section(lambda c: c["embedding"].update(group_size=7)), "group_size"),
    "other groups": (section(lambda c: c["embedding"].update(group_size=8)), "shape"),
    "dense after all": (section(lambda c: c.pop("embedding")), "missing"),
    "no codes": (tensors(lambda t: t.pop(f"{EMBED}.codes")), "missing"),
    "infinite scales": (tensors(lambda t: t[f"{EMBED}.scales"].fill_(0x7C00)), "scales"),
    "rows too few": (tensors(lambda t: t.update({f"{EMBED}.codes": t[f"{EMBED}.codes"][:-1].clone()})), "shape"),
}


@pytest.mark.parametrize("loader", [halfweight.load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tables_are_refused_in_one_line(case: str, loader: Any, tied: Path, tmp_path: Path) -> None:
    damage, words = HOSTILE[case]
    shutil.copytree(tied, tmp_path / "artifact")
    damage(tmp_path / "artifact")
    with pytest.raises(InputError) as caught:
        loader(tmp_path / "artifact")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tables_that_do_more_than_look_up_are_refused_before_the_work(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    class NormedEmbedding(torch.nn.Embedding):
        pass

    own = LlamaModel.__init__

    def init(self: Any, config: Any) -> None:
        own(self, config)
        self.embed_tokens = NormedEmbedding(config.vocab_size, config.hidden_size)

    monkeypatch.setattr(LlamaModel, "__init__", init)
    for work in (lambda: compress_checkpoint(llama, recipe, tmp_path / "out"), lambda: plan(llama, recipe)):
        with pytest.raises(InputError, match=r"model\.embed_tokens: is a NormedEmbedding; it cannot be quantized"):
            work()
    assert not list(tmp_path.iterdir())


def test_damaged_tables_are_named(make_model: Make, recipe: Recipe, tmp_path: Path) -> None:
    folder = make_model("llama")
    tensors(lambda t: t[f"{EMBED}.weight"][5].fill_(float("nan")))(folder)
    with pytest.raises(RunError, match=r"model\.embed_tokens: its weights are not finite"):
        compress_checkpoint(folder, recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bit": 8}, "embeddings.bit: unknown key; did you mean bits"),
        ({"bits": 16}, "embeddings.bits"),
        ({"group_size": 3}, "embeddings.group_size"),
        (8, "embeddings"),
        ({"targets": "*"}, "embeddings.targets: unknown key"),
    ],
)
def test_bad_recipes_are_one_line(settings: Any, words: str, text_file: Path) -> None:
    with pytest.raises(InputError) as caught:
        recipe_for(text_file, settings)
    assert words in str(caught.value).replace("'", "") and "\n" not in str(caught.value)


def test_recipes_read_back(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "mine.yaml") == recipe
