"""Linears whose tokens choose the inputs they read: stored forms, every implementation, dtype changes, bad tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from halfweight.serving import storage, verdicts
from halfweight.serving.errors import InputError
from halfweight.serving.int4 import exact_int4
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import ArtifactConfig, IntegerScheme, LinearScheme, SelectionScheme
from halfweight.serving.sharding import along_rows, column_scheme, row_scheme
from halfweight.serving.storage import Selection
from halfweight.serving.warmup import expect, warmup
from halfweight.triton_kernels import dispatch, trust
from halfweight.triton_kernels.cpu import layouts
from halfweight.triton_kernels.formats import FormatError
from halfweight.triton_kernels.formats.bits import from_bits, to_bits
from halfweight.triton_kernels.formats.input_select import InputSelection
from halfweight.triton_kernels.input_select import reference
from halfweight.triton_kernels.weight import Linear
from stored_linears import selecting
from test_storage import K, N, module, packed

CPU = torch.device("cpu")
BY_SIZE, BY_NORM = SelectionScheme(), SelectionScheme(norms=True)
TOP, TOP_BY_NORM = SelectionScheme(threshold="topk"), SelectionScheme(norms=True, threshold="topk")
OUTPUTS = IntegerScheme(group_size=16, along="outputs")


SELECTED = {
    "16-bit": selecting(BY_SIZE),
    "16-bit, norms, branch": selecting(BY_NORM, 5),
    "int4, norms, branch": selecting(BY_NORM, 3, integers=OUTPUTS),
    "8-bit": selecting(BY_SIZE, integers=OUTPUTS.model_copy(update={"bits": 8, "symmetric": True})),
    "8x1, branch": selecting(
        BY_SIZE, 7, pattern="8x1", density=2 / 3, kept=2, integers=IntegerScheme(group_size=8, along="outputs")
    ),
    "16-bit, top-k": selecting(TOP),
    "16-bit, top-k, norms, branch": selecting(TOP_BY_NORM, 5),
    "int4, top-k, norms, branch": selecting(TOP_BY_NORM, 3, integers=OUTPUTS),
    "8x1, top-k": selecting(
        TOP, pattern="8x1", density=2 / 3, kept=2, integers=IntegerScheme(group_size=8, along="outputs")
    ),
}


@pytest.fixture(autouse=True)
def _no_outcomes() -> Any:
    trust.forget()
    yield
    trust.forget()


@pytest.fixture(params=SELECTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def example(name: str) -> tuple[LinearScheme, dict[str, Tensor], Tensor]:
    """A scheme, its stored tensors, and the dense weight `[N, K]` they stand for."""
    chosen = SELECTED[name]
    plain = chosen.model_copy(update={"selection": None, "low_rank": None})
    if plain.integers is None:
        dense = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
        tensors = storage.pack_weight(dense, chosen)
    else:
        tensors, dense = packed(plain)
    generator = torch.Generator().manual_seed(1)
    branch: dict[str, Tensor] = {}
    if chosen.low_rank is not None:
        rank = chosen.low_rank.rank
        branch = {key: torch.randn(size, rank, generator=generator).bfloat16() for key, size in (("v", K), ("u", N))}
    assert chosen.selection is not None
    norms = torch.rand(K, generator=generator) + 0.5 if chosen.selection.norms else None
    topk = chosen.selection.threshold == "topk"
    reading = Selection(None if topk else 0.6, norms, **branch, inputs=29 if topk else None)
    return chosen, tensors | storage.pack_selection(chosen, reading), dense.double()


def expected(x: Tensor, dense: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The definition, token by token, in fp64."""
    rows = []
    for token in x.reshape(-1, K):
        score = token.float().abs() * (from_bits(tensors["norms"])[0] if "norms" in tensors else torch.ones(K))
        if "counts" in tensors:
            last = score.sort(descending=True).values[int(tensors["counts"]) - 1]
            read = score >= last  # more than the count where scores tie, as 16-bit inputs do
        else:
            read = ~(score <= from_bits(tensors["thresholds"])[0])
        y = dense[:, read] @ token.double()[read]
        if "V" in tensors:
            y += tensors["U"].double() @ (tensors["V"][0].double()[~read].T @ token.double()[~read])
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], N)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got.double() - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_token_reads_what_it_selects(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.SWITCH, backend)
    chosen, tensors, dense = example(name)
    storage.validate(chosen, tensors, (N, K))
    made = module(chosen, tensors).float()
    for leading in ((), (2, 3), (11,)):
        x = torch.randn(*leading, K)
        assert close(made(x), expected(x, dense, tensors))
    implementation = made.implementation()
    assert implementation is not None and implementation.run_all is not None
    assert implementation.backend == ("cpu" if backend == "auto" else "reference")
    assert close(implementation.run_all(x, None), x.double() @ dense.T)


def test_many_tokens_in_the_dtype_of_the_weights(name: str) -> None:
    chosen, tensors, dense = example(name)
    made, x = module(chosen, tensors).bfloat16(), torch.randn(40, K).bfloat16()
    assert close(made(x), expected(x, dense, tensors), 1e-2)
    implementation = made.implementation()
    assert implementation is not None and implementation.backend == "cpu" and implementation.run_all is not None
    bias = torch.randn(N).bfloat16()
    assert close(implementation.run_all(x, bias), x.double() @ dense.T + bias.double(), 1e-2)


def test_tokens_do_not_see_each_other(name: str) -> None:
    chosen, tensors, _ = example(name)
    made = module(chosen, tensors).float()
    for tokens in (3, 12):
        x = torch.randn(tokens, K)
        x[1, 5] = float("nan")
        got = made(x)
        assert bool(got[1].isnan().all() if chosen.group is None else got[1].isnan().any())
        assert bool(got[torch.arange(tokens) != 1].isfinite().all())
        torch.testing.assert_close(got[2], made(x[2]))


def test_stored_form_survives_use_dtype_changes_and_copies(name: str) -> None:
    chosen, tensors, _ = example(name)
    assert set(tensors) == set(storage.tensor_specs(chosen, (N, K)))
    assert storage.stored_bits(chosen, (N, K), torch.bfloat16) == 8 * sum(t.nbytes for t in tensors.values())
    made = module(chosen, tensors)
    x = torch.randn(2, K)
    made = made.float()
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    assert torch.equal(made(x.half()).half(), made(x.half()))
    made = made.bfloat16()
    made(x.bfloat16())
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in made.state_dict().items())
    assert ArtifactConfig.parse(ArtifactConfig(linears={"a": chosen}).to_json(), "config.json").linears["a"] == chosen


def test_damaged_tensors_are_refused(name: str) -> None:
    chosen, tensors, _ = example(name)
    for key in tensors:
        with pytest.raises(FormatError, match=key):
            storage.validate(chosen, {**tensors, key: tensors[key][..., :-1]}, (N, K))
    for key in {"thresholds", "norms"} & set(tensors):
        for hostile in (-1, 0x7F800000, 0x7FC00000):  # negative, infinite, not a number
            with pytest.raises(FormatError, match=f"{key} has an entry that is not a finite number"):
                storage.validate(chosen, {**tensors, key: torch.full_like(tensors[key], hostile)}, (N, K))
    for hostile in (-1, 0, K + 1) if "counts" in tensors else ():
        with pytest.raises(FormatError, match=f"counts has an entry that is not between 1 and {K} inputs"):
            storage.validate(chosen, {**tensors, "counts": torch.full_like(tensors["counts"], hostile)}, (N, K))


def test_a_selection_must_be_the_schemes() -> None:
    with pytest.raises(FormatError, match="a selection of thresholds, norms is not one of 16-bit, inputs by"):
        storage.pack_selection(selecting(BY_SIZE), Selection(0.5, torch.ones(K)))
    with pytest.raises(FormatError, match="a selection of thresholds is not one of 16-bit, top inputs by"):
        storage.pack_selection(selecting(TOP), Selection(0.5))
    with pytest.raises(FormatError, match="rank 25 is larger than a linear"):
        CompressedLinear(selecting(BY_SIZE, 25), K, N, False)


@pytest.mark.parametrize("count", [1, 13, 50, 64])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_reads_its_count_and_what_ties_with_the_last(dtype: torch.dtype, norms: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(40, 64, generator=generator).to(dtype)
    x[1, 20:] = 0  # fewer inputs than the count are not zero
    x[2] = 1.0
    x[3, 7] = float("nan")
    weights = torch.rand(64, generator=generator) + 0.5 if norms else torch.ones(64)
    kept = InputSelection(None, to_bits(weights)[None] if norms else None, counts=torch.tensor([count]).int())
    read = reference.selected(x, kept, 0)
    score = (x.float().abs() * weights).nan_to_num(nan=float("inf"))
    last = score.sort(dim=1, descending=True).values[:, count - 1 : count]
    assert torch.equal(read, (score >= last) & (score > 0))
    distinct = torch.tensor([len(set(row.tolist())) == 64 for row in score])
    assert bool((read.sum(1)[distinct] == count).all()) and (int(distinct.sum()) > 30) == (norms or dtype.itemsize == 4)
    assert bool(read[3, 7]) and int(read[1].sum()) <= 20


def test_an_old_scheme_reads_as_before_and_a_new_one_says_what_is_new() -> None:
    old = {"pattern": "dense", "density": 1.0, "selection": {"norms": True}}
    data = {"quant_method": "halfweight", "format_version": 1, "linears": {"a": old}}
    parsed = ArtifactConfig.parse(data, "config.json")
    assert parsed.linears["a"].selection == BY_NORM and parsed.to_json() == data
    new = ArtifactConfig(linears={"a": selecting(TOP)}).to_json()["linears"]["a"]["selection"]
    assert new == {"threshold": "topk"}  # a key that older releases refuse


def test_a_count_is_not_cut_along_the_inputs() -> None:
    with pytest.raises(InputError, match="threshold: topk with tensor parallel size 1"):
        column_scheme(selecting(TOP), K, 2)
    assert column_scheme(selecting(TOP), K, 1) == row_scheme(selecting(TOP), [8]) == selecting(TOP)
    counts = torch.tensor([5])
    assert along_rows(selecting(TOP), "counts", counts, 8, 8) is counts


def test_runs_on_the_kernels_and_says_so(name: str) -> None:
    chosen, tensors, _ = example(name)
    model = torch.nn.Sequential(module(chosen, tensors)).float()
    (choice,) = warmup(model, (1, 9))
    assert choice == expect("0", chosen, (N, K), torch.float32, CPU)
    assert (choice.backend, choice.reason) == ("cpu", f"{chosen.op} kernels")
    assert "inputs by |x|" in choice.numbers


def test_a_kernel_that_reads_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layouts.LAYOUTS["input_select"]

    def everything(form: Any) -> Linear:
        return right.linear(form._replace(thresholds=form.thresholds - 1e9))

    monkeypatch.setitem(layouts.LAYOUTS, "input_select", right._replace(linear=everything))
    chosen, tensors, _ = example("16-bit")
    (choice,) = warmup(torch.nn.Sequential(module(chosen, tensors)).float(), (1,))
    assert choice.backend == "reference" and "disagrees" in choice.reason


def test_a_dense_verdict_still_selects(name: str) -> None:
    chosen, tensors, dense = example(name)
    made = module(chosen, tensors).float()
    verdicts.use_dense(made, "verdict: dense")
    x = torch.randn(3, K)
    assert close(made(x), expected(x, dense, tensors))
    implementation = made.implementation()
    assert implementation is not None and implementation.backend == "dense" and implementation.run_all is not None
    assert close(implementation.run_all(x, None), x.double() @ dense.T)
    assert exact_int4(chosen) is None and verdicts.own_form(chosen) == "sparse"


def test_traces_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    chosen, tensors, _ = example(name)
    linear = module(chosen, tensors, torch.randn(N).bfloat16()).float()
    x = torch.randn(2, 3, K)
    want = linear(x)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["16-bit, norms, branch", "8x1, branch"])
def test_operators_keep_their_contracts(name: str) -> None:
    chosen, tensors, _ = example(name)
    weight = module(chosen, tensors).float()._weight()
    layout = layouts.LAYOUTS[chosen.op]
    form = layout.prepare(weight)
    operator = dispatch.operator_of(chosen.op, type(form), layout)
    torch.library.opcheck(operator.default, (torch.randn(2, K), *form, None))
