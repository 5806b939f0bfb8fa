"""What runs a compressed linear: choices with reasons, the check at warmup, the switch, tracing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from halfweight.serving.linear import CompressedLinear
from halfweight.serving.warmup import expect, explain, warmup
from halfweight.triton_kernels import dispatch, trust
from halfweight.triton_kernels.cpu import layouts
from halfweight.triton_kernels.weight import Linear
from test_storage import SCHEMES, K, N, module, packed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_outcomes() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


def small_model() -> nn.Sequential:
    """Two compressed linears of one kind, and one of another."""
    kinds = (SCHEMES["1x8"], SCHEMES["1x8"], SCHEMES["2:4"])
    return nn.Sequential(*(module(scheme, packed(scheme, seed)[0]) for seed, scheme in enumerate(kinds))).float()


def test_every_scheme_has_cpu_kernels() -> None:
    for scheme in SCHEMES.values():
        assert expect("layer", scheme, (N, K), torch.float32, CPU).backend == "cpu"


def test_choices_match_what_was_expected() -> None:
    model = small_model()
    assert {choice.backend for choice in explain(model)} == {"undecided"}
    choices = warmup(model, (1, 3), torch.float32)
    assert [choice.name for choice in choices] == ["0", "1", "2"]
    for choice, linear in zip(choices, model, strict=True):
        assert isinstance(linear, CompressedLinear)
        assert choice == expect(choice.name, linear.scheme, (N, K), torch.float32, CPU)


def test_the_switch_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.SWITCH, "reference")
    choices = warmup(small_model(), (1,), torch.float32)
    assert {(choice.backend, choice.reason) for choice in choices} == {("reference", "HALFWEIGHT_BACKEND=reference")}
    monkeypatch.setenv(dispatch.SWITCH, "fastest")
    with pytest.raises(ValueError, match="use auto or reference"):
        small_model()[0](torch.randn(1, K))


def test_a_wrong_kernel_is_switched_off_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layouts.LAYOUTS["group_int4"]

    def wrong(form: Any) -> Linear:
        linear = right.linear(form)
        return lambda x, bias: linear(x, bias) * (1.001 if len(x) == 3 else 1)

    monkeypatch.setitem(layouts.LAYOUTS, "group_int4", right._replace(linear=wrong))
    model = small_model()
    choices = warmup(model, (1, 3), torch.float32)
    assert [choice.backend for choice in choices] == ["reference", "reference", "cpu"]
    assert "group_int4.cpu disagrees with its reference on cpu (relative error 1.0e-03)" in choices[0].reason
    x = torch.randn(3, K)
    weight = model[0].dense_weight()
    torch.testing.assert_close(model[0](x), x @ weight.T)
    again = expect("layer", SCHEMES["1x8"], (N, K), torch.float32, CPU)
    assert again.backend == "reference" and "disagrees" in again.reason


def test_nan_is_no_agreement() -> None:
    assert not trust.record("op.kernel", CPU, float("nan"), 1.0, 1)
    assert trust.may_run("op.kernel", CPU)[0] is False


def test_inline_assembly_waits_for_its_check() -> None:
    allowed, reason = trust.may_run("two_four.mma_sp", torch.device("cuda"), inline_asm=True)
    assert not allowed and "has not passed warmup's check on cuda" in reason
    assert trust.record("two_four.mma_sp", torch.device("cuda"), 1e-4, 3e-3, 12)
    assert trust.may_run("two_four.mma_sp", torch.device("cuda"), inline_asm=True) == (True, "")


def test_inline_assembly_runs_for_the_tokens_it_was_checked_with() -> None:
    def runs(tokens: int) -> bool:
        return trust.may_run("int4.fragment", CPU, inline_asm=True, tokens=tokens)[0]

    trust.record("int4.fragment", CPU, 0.0, 1.0, 3)
    trust.record("int4.fragment", CPU, 0.0, 1.0, 12)
    assert [tokens for tokens in range(1, 40) if runs(tokens)] == [3, 4, *range(9, 17)]
    assert "for 5 tokens" in trust.may_run("int4.fragment", CPU, inline_asm=True, tokens=5)[1]
    trust.record("int4.fragment", CPU, 2.0, 1.0, 64)
    assert not any(runs(tokens) for tokens in range(1, 70))


def test_odd_dtypes_and_missing_compilers_fall_back_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    possible, reason = dispatch.can_run("two_four", (N, K), torch.float64, CPU)
    assert not possible and "not float64" in reason
    monkeypatch.setattr("halfweight.triton_kernels.cpu.jit.available", lambda: (False, "no compiler"))
    assert dispatch.can_run("two_four", (N, K), torch.float32, CPU) == (False, "no compiler")


@pytest.mark.parametrize("name", SCHEMES)
def test_traces_in_one_graph_with_the_right_shapes(name: str) -> None:
    torch.compiler.reset()  # one code object serves every scheme, and dynamo counts its recompilations
    scheme = SCHEMES[name]
    linear = module(scheme, packed(scheme)[0], torch.randn(N).bfloat16()).float()
    x = torch.randn(2, 3, K)
    want = linear(x)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=0)
    assert hasattr(torch.ops.halfweight, f"{scheme.op}_cpu")


def test_operators_keep_their_contracts() -> None:
    for scheme in (SCHEMES["2:4"], SCHEMES["1x8"], SCHEMES["int4 asymmetric"], SCHEMES["2:4 int4"]):
        linear = module(scheme, packed(scheme)[0]).float()
        weight = linear._weight()
        layout = layouts.LAYOUTS[scheme.op]
        form = layout.prepare(weight)
        operator = dispatch.operator_of(scheme.op, type(form), layout)
        torch.library.opcheck(operator.default, (torch.randn(2, K), *form, None))
