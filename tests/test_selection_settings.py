"""Input selection by itself: its byte budget, quantiles, branch, scores, and how a budget is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfweight import InputError
from halfweight.compress.allocation import divide
from halfweight.compress.passes import selection
from halfweight.compress.passes.base import SelectionSettings
from halfweight.compress.passes.low_rank import largest_singular
from halfweight.compress.quantiles import QuantileSketch
from halfweight.compress.sensitivity import input_sensitivities
from halfweight.serving.scheme import IntegerScheme, LinearScheme
from halfweight.serving.storage import pack_selection, selection_of, tensor_specs
from halfweight.triton_kernels.formats.bits import from_bits
from halfweight.triton_kernels.input_select import reference

DENSE = LinearScheme(pattern="dense", density=1.0)
INT4 = DENSE.model_copy(update={"integers": IntegerScheme(group_size=64, along="outputs")})


# --- budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [DENSE, INT4], ids=["16-bit", "int4"])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
@pytest.mark.parametrize(
    "fields", [{}, {"score": "l2"}, {"channels": 0.9}, {"score": "l1", "channels": 0.95}, {"channels": 0.0}], ids=str
)
def test_what_is_read_fills_the_budget(scheme: LinearScheme, shape: tuple[int, int], fields: dict[str, Any]) -> None:
    settings = SelectionSettings(sparsity=0.5, **fields)
    chosen = settings.scheme(scheme, shape)
    bits = {name: torch.Size(spec.shape).numel() for name, spec in tensor_specs(chosen, shape).items()}
    widths = {"weight_t": 16, "codes": 8, "scales": 16, "zeros": 8, "V": 16, "U": 16, "thresholds": 32, "norms": 32}
    bits = {name: count * widths[name] for name, count in bits.items()}
    beside = sum(bits.pop(name, 0) for name in ("V", "U", "thresholds", "norms"))
    inputs, rank = settings.split(shape, chosen)
    assert inputs * sum(bits.values()) + beside == pytest.approx(0.5 * sum(bits.values()), rel=1e-9)
    assert (chosen.low_rank.rank if chosen.low_rank else 0) == rank
    assert bool(rank) == (settings.channels < 1)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "few"])
def test_sketched_quantiles_are_the_real_ones(kind: str) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs()
    values = {"normal": values, "heavy": values**9, "zeros": values * (values > 1), "few": values[:7]}[kind]
    whole, halves = QuantileSketch(), QuantileSketch()
    whole.add(values)
    for part in values.split(len(values) // 2 + 1):
        halves.add(part)
    assert torch.equal(whole.counts, halves.counts)
    for share in (0.0, 0.1, 0.5, 0.75, 0.99, 1.0):
        below = float((values <= whole.quantile(share)).double().mean())
        floor = float((values == 0).double().mean())  # these cannot be told apart
        assert abs(below - max(share, floor)) <= max(0.003, 1 / len(values))
    assert QuantileSketch().quantile(0.5) == 0


# --- branch --------------------------------------------------------------------------------------------------------


def lost(weight: Tensor, x: Tensor, settings: SelectionSettings) -> float:
    scheme = settings.scheme(DENSE, (weight.shape[0], weight.shape[1]))
    chosen = selection.choose(weight, [x], settings, scheme, torch.float32)
    stored = selection_of(scheme, pack_selection(scheme, chosen))
    assert stored is not None and chosen.v is not None and chosen.u is not None
    read = x.abs() > from_bits(stored.thresholds)
    got = (x * read) @ weight.T + (x * ~read) @ chosen.v @ chosen.u.T
    return float((got - x @ weight.T).norm() / (x @ weight.T).norm())


def test_a_branch_fitted_to_the_inputs_loses_less() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator) * torch.logspace(0, -1, 64)
    settings = {branch: SelectionSettings(sparsity=0.4, channels=0.7, branch=branch) for branch in ("weight", "inputs")}
    errors = {branch: lost(weight, x, chosen) for branch, chosen in settings.items()}
    assert errors["inputs"] < 0.98 * errors["weight"]


def test_a_branch_of_the_weight_is_its_truncated_svd() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 64)
    settings = SelectionSettings(sparsity=0.4, channels=0.7, branch="weight")
    scheme = settings.scheme(DENSE, (48, 64))
    chosen = selection.choose(weight, [torch.randn(9, 64)], settings, scheme, torch.float32)
    left, values, right = torch.linalg.svd(weight.double())
    rank = settings.split((48, 64), scheme).rank
    want = left[:, :rank] @ values[:rank].diag() @ right[:rank]
    assert chosen.v is not None and chosen.u is not None
    torch.testing.assert_close((chosen.u @ chosen.v.T).double(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(largest_singular(weight, rank)[0].double(), values[:rank], rtol=1e-5, atol=0)


# --- scores --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Grouped queries' sizes, a gate, and a residual: `y = x + down(silu(gate(x)) * up(x))` after `x + o(v(x))`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"v": (4, 8), "o": (8, 4), "gate": (12, 8), "up": (12, 8), "down": (8, 12)}
        for name, (n, k) in sizes.items():
            self.add_module(name, nn.Linear(k, n, bias=False).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.v(x).cumsum(-2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_sensitivity_is_how_much_an_input_moves_the_output() -> None:
    torch.manual_seed(0)
    block, tokens = Small().double(), 5
    x = torch.randn(2, tokens, 8).double()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    found = [input_sensitivities(block, linears, [x], seed) for seed in range(400)]
    y = block(x)
    for name, linear in linears.items():
        got = torch.stack([run[name].double().square() for run in found]).mean(0)
        want = torch.zeros(linear.in_features).double()

        def moved(added: Tensor, linear: nn.Linear = linear) -> Tensor:
            handle = linear.register_forward_hook(lambda _, __, z: z + added)
            out = block(x)
            handle.remove()
            return out / y.norm(dim=-1, keepdim=True)

        zero = torch.zeros(2, tokens, linear.out_features).double()
        jacobian = torch.autograd.functional.jacobian(moved, zero)  # [2, T, 8, 2, T, N]
        want = (jacobian @ linear.weight).square().sum((0, 1, 2, 3, 4)) / (2 * tokens)
        torch.testing.assert_close(got, want, rtol=0.15, atol=0)  # the mean of 400 estimates
    norms = selection.column_norms(linears["down"].weight, "gradient", found[0]["down"])
    assert norms is not None and float(norms.mean()) == pytest.approx(1)
    assert input_sensitivities(block, linears, [x], 3)["v"].equal(found[3]["v"])


def test_sensitivities_need_to_be_collected() -> None:
    settings = SelectionSettings(sparsity=0.5, score="gradient")
    scheme = settings.scheme(DENSE, (8, 64))
    with pytest.raises(InputError, match="score: gradient needs gradients, which were not collected here"):
        selection.choose(torch.randn(8, 64), [torch.randn(9, 64)], settings, scheme, torch.float32)


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_a_threshold_leaves_out_what_its_truncation_error_allows(target: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 96, generator=generator) * torch.logspace(0, -1, 96)
    inputs = [torch.randn(3, 40, 96, generator=generator) ** 3 for _ in range(2)]
    settings = SelectionSettings(truncation=target, score="l2")
    scheme = settings.scheme(DENSE, (16, 96))
    chosen = selection.choose(weight, inputs, settings, scheme, torch.float32)
    stored = selection_of(scheme, pack_selection(scheme, chosen))
    assert stored is not None and chosen.norms is not None
    x = torch.cat(inputs).reshape(-1, 96)

    def error(read: Tensor) -> float:
        """By the definition, one token at a time."""
        lost = [
            sum((x_i * weight[:, i] for i, x_i in enumerate(token) if not kept[i]), torch.zeros(16)).norm()
            / (weight @ token).norm()
            for token, kept in zip(x, read, strict=True)
        ]
        return float(sum(lost) / len(lost))

    read = reference.selected(x, stored, 0)
    size = x.abs() * weight.norm(dim=0)
    assert float(size[~read].max()) <= float(size[read].min()) * (1 + 1e-5)  # one threshold on |x_i| ||W[:, i]||
    assert 0.97 * target < error(read) <= target * 1.001


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
@pytest.mark.parametrize("fields", [{}, {"score": "l2"}, {"score": "l1", "channels": 0.9}], ids=str)
def test_counts_fill_the_budget(shape: tuple[int, int], fields: dict[str, Any]) -> None:
    settings = SelectionSettings(sparsity=0.5, threshold="topk", **fields)
    scheme = settings.scheme(DENSE, shape)
    weight, x = torch.randn(shape), torch.randn(64, shape[1])
    chosen = selection.choose(weight, [x], settings, scheme, torch.float32)
    stored = selection_of(scheme, pack_selection(scheme, chosen))
    assert stored is not None and chosen.threshold is None
    wanted = settings.split(shape, scheme).inputs
    read = reference.selected(x, stored, 0).sum(1)
    assert bool((read == chosen.inputs).all()) and abs(chosen.inputs / shape[1] - wanted) <= 0.5 / shape[1]
    same = SelectionSettings(sparsity=0.5, **fields)
    assert same.split(shape, same.scheme(DENSE, shape)) == settings.split(shape, scheme)


# --- allocation ----------------------------------------------------------------------------------------------------


def test_the_budget_goes_where_it_costs_least() -> None:
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    curves = {
        "dear": {level: 100 * level**2 for level in levels},
        "cheap": {level: level**2 for level in levels},
        "bumpy": {level: 40 * level**2 + (12 if level == 0.5 else 0) for level in levels},
    }
    weights, even = {"dear": 300, "cheap": 100, "bumpy": 200}, dict.fromkeys(curves, 0.5)
    chosen = divide(curves, weights, even)
    unread = sum(chosen[name] * weights[name] for name in curves)
    assert unread == pytest.approx(0.5 * sum(weights.values()))
    assert chosen == {"dear": pytest.approx(0.3), "cheap": pytest.approx(0.9), "bumpy": pytest.approx(0.6)}
    twins = divide(dict.fromkeys("ab", curves["dear"]), dict.fromkeys("ab", 5), dict.fromkeys("ab", 0.6))
    assert sorted(twins.values()) == [pytest.approx(0.5), pytest.approx(0.7)]
