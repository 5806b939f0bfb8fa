"""A linear whose inputs a prompt chooses: counting, ties, padding, every stored form, what runs it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfweight import InputError
from halfweight.serving.core_inputs import CoreInputs
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import IntegerScheme, SelectionScheme
from halfweight.serving.sharding import column_scheme
from halfweight.serving.storage import Selection, pack_selection, pack_weight
from halfweight.serving.warmup import expect, warmup
from halfweight.triton_kernels import trust
from halfweight.triton_kernels.formats.bits import from_bits
from stored_linears import selecting
from test_storage import K, N, module, packed

COUNT = 29
OUTPUTS = IntegerScheme(group_size=16, along="outputs")
CORE, CORE_BY_NORM = SelectionScheme(threshold="prompt"), SelectionScheme(norms=True, threshold="prompt")


SCHEMES = {
    "16-bit": selecting(CORE),
    "16-bit, norms, branch": selecting(CORE_BY_NORM, 5),
    "int4, norms, branch": selecting(CORE_BY_NORM, 3, integers=OUTPUTS),
    "8-bit": selecting(CORE, integers=OUTPUTS.model_copy(update={"bits": 8, "symmetric": True})),
    "8x1": selecting(CORE, pattern="8x1", density=2 / 3, kept=2, integers=IntegerScheme(group_size=8, along="outputs")),
}


# --- one linear ----------------------------------------------------------------------------------------------------


def chosen_by(prompt: Tensor, norms: Tensor | None, count: int) -> list[int]:
    """By the definition, one token at a time: the `count` inputs that most tokens of `prompt` `[T, K]` would choose."""
    width = prompt.shape[1]
    votes, sums = [0] * width, [0.0] * width
    for token in prompt:
        scores = [abs(float(v)) * (1 if norms is None else float(norms[k])) for k, v in enumerate(token.float())]
        for k in sorted(range(width), key=lambda k: -scores[k])[:count]:
            votes[k] += 1
        sums = [total + score for total, score in zip(sums, scores, strict=True)]
    return sorted(sorted(range(width), key=lambda k: (-votes[k], -sums[k], k))[:count])


def norms_of(tensors: Mapping[str, Tensor]) -> Tensor | None:
    return from_bits(tensors["norms"])[0] if "norms" in tensors else None


def expected(x: Tensor, weight: Tensor, tensors: Mapping[str, Tensor], core: list[int]) -> Tensor:
    """`[..., N]` in fp64, for the dense `weight` `[N, K]`, where every token reads the inputs `core`."""
    mask = torch.zeros(x.shape[-1], dtype=torch.float64)
    mask[core] = 1
    x = x.double()
    y = (x * mask) @ weight.double().T
    return y if "V" not in tensors else y + (x * (1 - mask)) @ tensors["V"][0].double() @ tensors["U"].double().T


def example(name: str) -> tuple[CompressedLinear, CoreInputs, dict[str, Tensor], Tensor]:
    """An fp32 linear with a bias of ones, its form, its stored tensors, and the dense weight that they stand for."""
    chosen = SCHEMES[name]
    assert chosen.selection is not None
    if chosen.integers is None:
        dense = draw(N, K).bfloat16()
        tensors = pack_weight(dense, chosen)
    else:
        tensors, dense = packed(chosen.model_copy(update={"selection": None, "low_rank": None}))
    generator = torch.Generator().manual_seed(1)
    rank = 0 if chosen.low_rank is None else chosen.low_rank.rank
    branch = {key: torch.randn(size, rank, generator=generator).bfloat16() for key, size in (("v", K), ("u", N))}
    norms = torch.rand(K, generator=generator) + 0.5 if chosen.selection.norms else None
    tensors |= pack_selection(chosen, Selection(None, norms, **(branch if rank else {}), inputs=COUNT))
    linear = module(chosen, tensors, torch.ones(N).bfloat16()).float()
    assert isinstance(linear.form, CoreInputs)
    return linear, linear.form, tensors, dense


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got.double() - want).norm() / want.norm()) < tolerance


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_outcomes() -> Any:
    trust.forget()
    yield
    trust.forget()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_prompt_chooses_what_the_tokens_after_it_read(name: str, backend: Any) -> None:
    linear, form, tensors, dense = example(name)
    linear.backend = backend
    prompt, after = draw(2, 7, K), draw(2, 1, K, seed=1)
    assert close(linear(prompt) - 1, prompt.double() @ dense.double().T)
    form.decoding = True
    core = chosen_by(prompt.flatten(0, 1), norms_of(tensors), COUNT)
    assert close(linear(after) - 1, expected(after, dense, tensors, core))
    assert form.core is not None and form.core.tolist() == core
    form.forget()
    other = draw(1, 3, K, seed=2)
    form.decoding = False
    linear(other)
    form.decoding = True
    again = chosen_by(other[0], norms_of(tensors), COUNT)
    assert again != core
    assert close(linear(after) - 1, expected(after, dense, tensors, again))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_window_is_scored_as_it_would_be_decoded(name: str) -> None:
    linear, form, tensors, dense = example(name)
    window = draw(1, 20, K)
    form.prompt_tokens = 6
    got = linear(window)
    core = chosen_by(window[0, :6], norms_of(tensors), COUNT)
    assert close(got[:, :6] - 1, window[:, :6].double() @ dense.double().T)
    assert close(got[:, 6:] - 1, expected(window[:, 6:], dense, tensors, core))
    form.given = torch.arange(COUNT) + 3
    assert close(linear(window)[:, 6:] - 1, expected(window[:, 6:], dense, tensors, form.given.tolist()))


def test_a_prompt_in_parts_counts_as_a_whole() -> None:
    linear, form, tensors, _ = example("16-bit, norms, branch")
    prompt, after = draw(1, 2100, K), draw(1, 1, K, seed=1)  # more tokens than are counted at once
    for part in prompt.split([1000, 1, 1099], dim=1):
        linear(part)
    form.decoding = True
    linear(after)
    parts = form.core
    form.forget()
    form.decoding = False
    linear(prompt)
    form.decoding = True
    linear(after)
    assert parts is not None and form.core is not None and form.core.equal(parts)
    votes = [0] * K
    score = prompt[0].abs() * from_bits(tensors["norms"])[0]
    for row in score.argsort(dim=1, descending=True)[:, :COUNT].tolist():
        for k in row:
            votes[k] += 1
    least = sorted(votes)[-COUNT]
    assert (
        {k for k in range(K) if votes[k] > least} <= set(parts.tolist()) <= {k for k in range(K) if votes[k] >= least}
    )


def test_ties_go_to_the_larger_sum_and_then_to_the_first() -> None:
    linear, form, _, _ = example("16-bit")
    prompt = torch.zeros(2, K)
    prompt[0, :COUNT] = 1.0  # each token votes for inputs of its own
    prompt[1, COUNT : 2 * COUNT] = torch.linspace(0.5, 1.5, COUNT)
    linear(prompt)
    form.decoding = True
    linear(prompt[:1])
    larger = int((torch.linspace(0.5, 1.5, COUNT) > 1).sum())
    want = [*range(COUNT - larger), *range(2 * COUNT - larger, 2 * COUNT)]
    assert form.core is not None and form.core.tolist() == want


def test_padding_does_not_vote() -> None:
    linear, form, _, _ = example("16-bit")
    prompt = draw(2, 5, K)
    padded = torch.cat((draw(1, 2, K, seed=3) * 50, prompt[1:, 2:]), dim=1)
    form.padding = torch.tensor([[False] * 5, [True, True, False, False, False]]).flatten()
    linear(torch.cat((prompt[:1], padded)))
    form.decoding = True
    linear(prompt[:, :1])
    assert form.core is not None
    assert form.core.tolist() == chosen_by(torch.cat((prompt[0], prompt[1, 2:])), None, COUNT)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_rows_are_a_copy_and_the_stored_form_stays(name: str) -> None:
    linear, form, tensors, _ = example(name)
    prompt, after = draw(1, 7, K), draw(1, 1, K, seed=1)
    linear(prompt)
    form.decoding = True
    want = linear(after)
    assert all(torch.equal(tensor, tensors[key].to(tensor.dtype)) for key, tensor in linear.stored().items())
    assert torch.equal(linear(after), want)  # what was counted outlives the change of form
    assert torch.equal(copy.deepcopy(linear)(after), want)
    twin = copy.deepcopy(linear)
    assert isinstance(twin.form, CoreInputs)
    twin.form.forget()
    assert torch.equal(linear(after), want)
    linear = linear.bfloat16()
    assert close(linear(after.bfloat16()), want.double(), 2e-2)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_runs_it_is_said(name: str) -> None:
    linear, _, _, _ = example(name)
    (choice,) = warmup(nn.Sequential(linear), (1, 9))
    assert choice == expect("0", SCHEMES[name], (N, K), torch.float32, torch.device("cpu"))
    by = "by plain matmuls" if SCHEMES[name].integers is None else "in decoding by cpu: input_select_int4 kernels"
    assert (choice.backend, choice.reason) == ("torch", f"the prompt's inputs, {by}")
    assert "core inputs by |x|" in choice.numbers


def test_gradients_pass_through_a_prompt() -> None:
    linear, _, _, dense = example("16-bit, norms, branch")
    x = draw(1, 4, K).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None and close(x.grad, dense.double().sum(0).expand(1, 4, K))


def test_a_count_is_not_cut_along_the_inputs() -> None:
    with pytest.raises(InputError, match="threshold: prompt with tensor parallel size 1"):
        column_scheme(SCHEMES["16-bit"], K, 2)
