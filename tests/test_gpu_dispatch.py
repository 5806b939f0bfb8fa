"""Compressed linears on a GPU, as far as a machine without one allows: its kernels interpreted, its choices made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import halfweight
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.storage import settings_of
from halfweight.serving.warmup import expect, explain, warmup
from halfweight.triton_kernels import dispatch, gpu, trust
from halfweight.triton_kernels.launch import Kernel, Launch
from halfweight.triton_kernels.simulate.interpreter import interpret
from test_selection import SELECTED, close, example, expected
from test_storage import SCHEMES, K, N, module, packed

CPU = torch.device("cpu")
HALF = torch.float16


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CPU stands in for an H100: kernels run in the interpreter. Names of the launched kernels, in order."""
    names: list[str] = []

    def run(kernel: Kernel, launch: Launch) -> None:
        names.append(kernel.name)
        interpret(kernel.jit(), launch)

    monkeypatch.setattr(Kernel, "run", run)
    monkeypatch.setattr(dispatch, "backend_of", lambda device: "triton")
    for name in ("gpu", *(f"{op}.op" for op in gpu.FORMS)):
        target = import_module(f"halfweight.triton_kernels.{name}")
        monkeypatch.setattr(target, "device_target", lambda device: "sm_90")
    trust.forget()
    yield names
    trust.forget()


@pytest.fixture(scope="module")
def artifact(llama: Path, small_recipe: halfweight.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    halfweight.compress_checkpoint(llama, small_recipe, out)
    return out


def half(name: str, seed: int = 0) -> CompressedLinear:
    return module(SCHEMES[name], packed(SCHEMES[name], seed)[0], torch.randn(N).bfloat16()).half()


@pytest.mark.parametrize("name", SCHEMES)
def test_reproduces_the_reference_or_says_why_not(name: str, launched: list[str]) -> None:
    linear, scheme = half(name), SCHEMES[name]
    stored = {key: tensor.clone() for key, tensor in linear.stored().items()}
    backend, reason = dispatch.expect(scheme.op, (N, K), HALF, CPU, settings_of(scheme))
    x, weight = torch.randn(2, 3, K).half(), linear.dense_weight()
    want = x.float() @ weight.T + linear.bias
    error = (linear(x).float() - want).norm() / want.norm()
    assert error < 3e-3
    chosen = linear.implementation()
    assert (chosen.backend, chosen.reason) == (backend, reason)
    if backend == "triton":
        shared = "input_select.reduce"  # sums up for the integers, too
        assert launched and all(kernel.startswith(scheme.op + ".") or kernel == shared for kernel in launched)
        assert scheme.input_major or "has not passed warmup's check" in reason
    else:
        assert not launched and ("groups of a multiple of 32" in reason or "take 4 bits, not 8" in reason)
    for key, tensor in linear.stored().items():  # bit for bit
        assert torch.equal(tensor, stored[key]) and tensor.dtype == stored[key].dtype


@pytest.mark.parametrize("name", SELECTED)
def test_selected_inputs_reproduce_the_definition(name: str, launched: list[str]) -> None:
    torch.manual_seed(58)  # draws a token of whose inputs two tie for the last place, in fp16
    scheme, tensors, dense = example(name)
    linear = module(scheme, tensors).half()
    tensors = {key: tensor.clone() for key, tensor in linear.stored().items()}
    for tokens in (1, 3):
        x = torch.randn(tokens, K).half()
        assert close(linear(x), expected(x, dense, tensors), 3e-3)
    chosen = linear.implementation()
    assert chosen is not None and chosen.run_all is not None
    if scheme.integers is not None and scheme.integers.bits == 8:
        assert chosen.backend == "reference" and chosen.reason == "input_select_int4 kernels take 4 bits, not 8"
    else:
        assert chosen.backend == "triton" and launched[-1].startswith("input_select")
    assert close(chosen.run_all(x, None), x.double() @ dense.T, 3e-3)
    for key, tensor in linear.stored().items():
        assert torch.equal(tensor, tensors[key]) and tensor.dtype == tensors[key].dtype


def test_inline_assembly_runs_once_it_has_passed(launched: list[str]) -> None:
    model = nn.Sequential(half("2:4"), half("1x8"))
    model[0](torch.randn(1, K).half())  # chosen before it was checked
    assert launched == ["two_four.select"]
    choices = warmup(model, (1, 64), HALF)
    assert [(choice.backend, choice.reason) for choice in choices] == [
        ("triton", "two_four kernels"),
        ("triton", "group_int4 kernels"),
    ]
    launched.clear()
    model[0](torch.randn(1, K).half())
    assert launched == ["two_four.mma_sp"]


def test_what_warmup_did_not_run_is_not_trusted(launched: list[str]) -> None:
    (choice,) = warmup(nn.Sequential(half("2:4")), (64,), HALF)
    assert "two_four kernels without two_four.mma_sp: " in choice.reason
    assert set(launched) == {"two_four.expand"}


def wrong_results(monkeypatch: pytest.MonkeyPatch, wrong: str, failure: str = "") -> None:
    """Kernel `wrong` puts a result off by 1 %, or raises an error that says `failure`."""
    right = Kernel.run

    def run(kernel: Kernel, launch: Launch) -> None:
        if kernel.name == wrong and failure:
            raise RuntimeError(failure)  # a new one: its traceback would keep the tensors of the launch
        right(kernel, launch)
        if kernel.name == wrong:
            y: Any = launch.arguments["y"]
            y.mul_(1.01)

    monkeypatch.setattr(Kernel, "run", run)


def test_wrong_inline_assembly_gives_way_to_other_kernels(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    wrong_results(monkeypatch, "two_four.mma_sp")
    model = nn.Sequential(half("2:4"))
    (choice,) = warmup(model, (1, 8), HALF)
    assert choice.backend == "triton"
    assert "two_four kernels without two_four.mma_sp: two_four.mma_sp disagrees" in choice.reason
    assert launched.count("two_four.mma_sp") == 1  # and never again
    launched.clear()
    model(torch.randn(1, K).half())
    assert launched == ["two_four.select"]


def test_a_wrong_kernel_gives_way_to_the_reference(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    wrong_results(monkeypatch, "int4.simt")
    model = nn.Sequential(half("int4 symmetric"), half("2:4"))
    choices = warmup(model, (1,), HALF)
    assert [choice.backend for choice in choices] == ["reference", "triton"]
    assert "int4.triton disagrees with its reference" in choices[0].reason
    assert "int4.fragment" not in launched
    assert expect("0", model[0].scheme, (N, K), HALF, CPU) == choices[0]


def test_a_kernel_that_does_not_compile_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_results(monkeypatch, "two_four.mma_sp", "ptxas failed\nline 2")
    (choice,) = warmup(nn.Sequential(half("2:4")), (1,), HALF)
    assert choice.backend == "triton" and choice.reason.endswith("two_four.mma_sp does not run on cpu: ptxas failed")


def test_what_the_kernels_refuse_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(half("2:4").bfloat16(), half("int4 symmetric").float())
    x = torch.randn(1, K)
    model[1](x)
    assert "not float32" in explain(model)[1].reason
    choice = dispatch.prepare(model[0]._weight(), HALF)
    assert choice.backend == "reference"
    assert choice.reason == "the 2:4 kernels want inputs of the weight's bfloat16, not float16"
    monkeypatch.setattr(gpu, "device_target", lambda device: "sm_70")
    assert dispatch.can_run("two_four", (N, K), HALF, CPU) == (False, "no kernels are built for sm_70")
    assert dispatch.can_run("unheard_of", (N, K), HALF, CPU) == (False, "unheard_of has no GPU kernels")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert dispatch.can_run("two_four", (N, K), HALF, CPU) == (False, "triton is not installed")


def test_inspect_says_what_runs_and_what_does_not(artifact: Path) -> None:
    layers = halfweight.inspect_checkpoint(artifact, device="cpu", dtype="float16").layers
    reason = "two_four kernels without two_four.mma_sp: two_four.mma_sp has inline assembly and has not passed"
    assert all(layer.backend == "triton" and str(layer.reason).startswith(reason) for layer in layers)
    layers = halfweight.inspect_checkpoint(artifact, device="cpu", dtype="float32").layers
    assert {layer.backend for layer in layers} == {"reference"} and "not float32" in str(layers[0].reason)


def test_another_dtype_than_prepared_for_is_refused() -> None:
    linear = half("int4 symmetric")
    linear(torch.randn(1, K).half())
    with pytest.raises(ValueError, match="prepared for float16 inputs, got float32"):
        linear(torch.randn(1, K))


@pytest.mark.parametrize("name", ["2:4", "2:4 int4", "int4 asymmetric", "1x8", "1x8 layer"])
def test_expanded_weights_share_one_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_ROOMS", WeakValueDictionary())  # none of another test's rooms
    first, second = half(name), half(name, 1)
    first.prepare(HALF), second.prepare(HALF)
    (room,) = gpu._ROOMS.values()
    op = import_module(f"halfweight.triton_kernels.{first.op}.op")
    given, compute = [], op.linear
    monkeypatch.setattr(op, "linear", lambda *args, **more: given.append(more.get("scratch")) or compute(*args, **more))
    x = torch.randn(64, K).half()
    for linear in (first, second):
        want = x.float() @ linear.dense_weight().T + linear.bias
        linear.prepare(HALF)
        room.fill_(float("nan"))
        assert (linear(x).float() - want).norm() < 3e-3 * want.norm()
        assert not room.isnan().all()
    monkeypatch.setattr(gpu, "_stream", lambda device: 1)  # as while a graph is captured
    second(x)
    assert [scratch is room for scratch in given] == [True, True, False]
    del room, given[:], first, second, linear
    assert not gpu._ROOMS


@pytest.mark.parametrize("name", ["2:4", "2:4 int4", "int4 asymmetric", "1x8", "1x8 layer"])
def test_traces_in_one_graph(name: str, launched: list[str]) -> None:
    torch.compiler.reset()
    linear = half(name)
    linear.prepare(HALF)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return lambda *arguments: (arguments[0].new_zeros((2, 3, N)),)

    assert torch.compile(linear, fullgraph=True, backend=backend)(torch.randn(2, 3, K).half()).shape == (2, 3, N)
    (graph,) = graphs
    (node,) = (node for node in graph.graph.nodes if "halfweight" in str(node.target))
    assert str(node.target) == f"halfweight.{SCHEMES[name].op}_gpu"
    assert node.meta["example_value"].shape == (2, 3, N) and node.meta["example_value"].dtype == HALF
    assert not launched


def test_a_table_is_looked_up_and_multiplied_in_one_form(launched: list[str]) -> None:
    weight = dataclasses.replace(half("int4 symmetric")._weight(), op="tied")
    dense, ids, x = weight.dense(torch.float32), torch.tensor([[3, 0], [23, 3]]), torch.randn(2, K).half()
    assert dispatch.verify(weight, HALF, 2) == (True, "")
    chosen = dispatch.prepare(weight, HALF)
    assert (chosen.backend, chosen.reason) == ("triton", "tied kernels")
    assert {"tied.lookup", "int4.simt", "int4.fragment"} <= set(launched)
    assert chosen.rows is not None
    torch.testing.assert_close(chosen.rows(ids, torch.float32), dense[ids], rtol=0, atol=0)
    torch.testing.assert_close(chosen(x, None).float(), x.float() @ dense.T, rtol=3e-3, atol=1e-2)
