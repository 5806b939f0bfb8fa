"""Trainable weights: they start as what is stored, stay on it while they move, and have the right gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfweight.compress.passes import PASSES, StageConfig, low_rank
from halfweight.compress.statistics import InputStatistics
from halfweight.compress.tuning.cost import Workload, held, numbers
from halfweight.compress.tuning.logical import pack_logical, unpack_weight
from halfweight.compress.tuning.weights import FloatWeight, TrainedLinear, unit_of
from halfweight.serving import storage
from halfweight.serving.scheme import LinearScheme

SHAPE = (24, 40)
EVERYTHING = ("weights", "scales", "zeros", "branch")
STAGES = {
    "two_four": {"pass": "wanda", "pattern": "2:4"},
    "dense": {"pass": "magnitude", "pattern": "unstructured", "density": 0.4},
    "integers": {"pass": "rtn", "group_size": 16},
    "integers sym": {"pass": "rtn", "group_size": 64, "symmetric": True},
    "int8": {"pass": "rtn", "group_size": 16, "bits": 8},
    "2 bits": {"pass": "rtn", "group_size": 16, "bits": 2},
    "4:8": {"pass": "gqsa", "pattern": "4:8", "group_size": 16},
    "two_four_int4": {"pass": "gqsa", "pattern": "2:4", "group_size": 16},
    "groups": {"pass": "gqsa", "pattern": "1x8", "density": 0.6},
    "groups sym": {"pass": "gqsa", "pattern": "1x16", "density": 0.5, "symmetric": True},
    "groups_layer": {"pass": "gqsa", "pattern": "1x8", "density": 0.5, "balance": "layer"},
    "branch": {"pass": "rtn", "group_size": 16, "low_rank": {"fraction": 0.5}},
    "int4 branch": {"pass": "rtn", "group_size": 16, "low_rank": {"fraction": 0.5, "bits": 4, "group_size": 16}},
    "int branch": {"pass": "wanda", "pattern": "2:4", "low_rank": {"fraction": 0.5, "bits": 8, "group_size": 16}},
}


def stored(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[StageConfig, LinearScheme, dict[str, Tensor]]:
    """A random linear of SHAPE, compressed by the stage called `name`."""
    generator = torch.Generator().manual_seed(0)
    settings = dict(STAGES[name])
    method = PASSES[str(settings["pass"])]
    stage = method.config.model_validate(settings).for_linear("down_proj", SHAPE)
    weight = torch.randn(SHAPE, generator=generator).to(dtype).float()
    statistics = InputStatistics(SHAPE[1], True, torch.device("cpu"))
    statistics.add(torch.randn(100, SHAPE[1], generator=generator))
    result = low_rank.solve(method, weight, statistics, stage, dtype)
    scheme = stage.scheme(SHAPE)
    packed = storage.pack_weight(result.weight.to(dtype), scheme, result.quantized, result.mask)
    if scheme.low_rank is not None:
        assert result.branch is not None
        v, u, codes = result.branch
        packed |= storage.pack_branch(scheme.low_rank, v.to(dtype), u.to(dtype), codes)
    return stage, scheme, packed


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def by_group(x: Tensor) -> Tensor:
    """Sums over groups of eight columns."""
    return x.unflatten(1, (-1, 8)).sum(-1)


def disturb(module: TrainedLinear, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, parameter in module.trained():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", STAGES)
def test_unpacking_is_the_inverse_of_packing(name: str) -> None:
    _, scheme, tensors = stored(name)
    plain = scheme.model_copy(update={"low_rank": None})
    own = {suffix: tensor for suffix, tensor in tensors.items() if suffix[0] not in "VU"}
    assert same(pack_logical(plain, unpack_weight(plain, own, SHAPE)), own)


@pytest.mark.parametrize("train", [EVERYTHING, ("scales", "branch"), ("scales", "zeros"), ("norms",)], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_what_is_trained_is_what_is_stored(name: str, train: tuple[str, ...]) -> None:
    stage, scheme, tensors = stored(name)
    module = TrainedLinear(scheme, stage, tensors, SHAPE, train)
    start = storage.effective_weight(scheme, tensors, SHAPE, torch.float32)
    torch.testing.assert_close(module(), start, rtol=0, atol=0)
    assert same(module.stored(tensors), tensors)
    disturb(module, 0.3)
    moved = module.stored(tensors)
    plain = {suffix: tensor for suffix, tensor in moved.items() if suffix[0] not in "VU"}
    storage.validate(scheme, plain, SHAPE)
    torch.testing.assert_close(module(), storage.effective_weight(scheme, moved, SHAPE, torch.float32), rtol=0, atol=0)
    trained = {part for _, part, _ in module.trained()}
    assert same(moved, tensors) == (not trained)
    if scheme.low_rank is None:
        before = unpack_weight(scheme, tensors, SHAPE)
        assert before.mask is None or not bool((module() != 0)[~before.mask].any())
    if "weights" not in trained and scheme.integers is not None:
        (_, then, mask), (_, now, _) = (unpack_weight(scheme, part, SHAPE) for part in (tensors, moved))
        assert then is not None and now is not None
        assert bool(((then.codes == now.codes) | ~(torch.ones(SHAPE).bool() if mask is None else mask)).all())


@pytest.mark.parametrize("name", ["integers", "groups", "branch"])
def test_codes_start_where_they_are_but_as_close_to_the_next_as_the_dense_weight(name: str) -> None:
    stage, scheme, tensors = stored(name)
    dense = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = TrainedLinear(scheme, stage, tensors, SHAPE, EVERYTHING, dense)
    assert same(module.stored(tensors), tensors)
    far = TrainedLinear(scheme, stage, tensors, SHAPE, EVERYTHING)
    steps, middle = (dict((n, p) for n, _, p in m.trained())["weight.steps"].detach() for m in (module, far))
    moved = (steps - middle).flatten(1)[:, : SHAPE[1]]
    assert 0.05 < float(moved.abs().mean()) < 0.5 and float(moved.abs().max()) <= 0.4501
    wrong = dense.float() - storage.effective_weight(scheme, tensors, SHAPE, torch.float32)
    kept = unpack_weight(scheme, tensors, SHAPE).mask
    agree = (moved * wrong >= 0) | (moved.abs() < 1e-3)
    assert bool(agree[slice(None) if kept is None else kept].all())


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_fewer_bits_stay_within_them(bits: int) -> None:
    stage, scheme, tensors = stored("2 bits")
    stage = stage.model_copy(update={"bits": bits})
    module = TrainedLinear(scheme, stage, tensors, SHAPE, EVERYTHING)
    disturb(module, 5.0)
    quantized = unpack_weight(scheme, module.stored(tensors), SHAPE).quantized
    assert quantized is not None and int(quantized.codes.max()) == 2**bits - 1


def test_a_step_of_the_grid_is_the_unit_of_a_code() -> None:
    stage, scheme, tensors = stored("integers")
    module = TrainedLinear(scheme, stage, tensors, SHAPE, ("weights",))
    before = unpack_weight(scheme, tensors, SHAPE).quantized
    with torch.no_grad():
        for _, _, parameter in module.trained():
            parameter.add_(1.0)
    after = unpack_weight(scheme, module.stored(tensors), SHAPE).quantized
    assert before is not None and after is not None
    assert torch.equal(after.codes, (before.codes + 1).clamp(max=15))


def test_a_branch_moves_its_codes_while_those_of_the_weight_stay() -> None:
    stage, scheme, tensors = stored("int4 branch")
    module = TrainedLinear(scheme, stage, tensors, SHAPE, ("weights", "branch"), codes=False)
    before = {half: tensors[f"{half}.codes"].clone() for half in "VU"}
    parameters = {name: parameter for name, _, parameter in module.trained()}
    assert set(parameters) == {"v.steps", "v.log_scales", "u.steps", "u.log_scales"}
    assert 0.5 < float(parameters["u.steps"].detach().square().mean().sqrt()) < 2  # rates are relative to this
    with torch.no_grad():
        parameters["u.steps"].add_(1.0)
    after = module.stored(tensors)
    assert torch.equal(after["codes"], tensors["codes"]) and torch.equal(after["V.codes"], before["V"])
    assert not torch.equal(after["U.codes"], before["U"])


def test_gradients_of_frozen_codes_are_those_of_the_formula() -> None:
    stage, scheme, tensors = stored("groups")
    module = TrainedLinear(scheme, stage, tensors, SHAPE, ("scales", "zeros"))
    wanted = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    (module() * wanted).sum().backward()
    logical = unpack_weight(scheme, tensors, SHAPE)
    assert logical.quantized is not None and logical.mask is not None
    codes, scales, zeros = (part.float() for part in logical.quantized)
    spread = torch.arange(SHAPE[1]) // 8
    values = (codes - zeros[:, spread]) * scales[:, spread]
    grads = {name: parameter.grad[..., 0] for name, _, parameter in module.trained()}
    torch.testing.assert_close(grads["weight.log_scales"], by_group(values * wanted))
    shifted = -by_group(wanted * logical.mask) * scales
    torch.testing.assert_close(grads["weight.zero_shift"], shifted)


def test_a_scale_has_its_whole_gradient_while_codes_are_trained_too() -> None:
    stage, scheme, tensors = stored("integers")
    wanted = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    grads = []
    for train in (("scales",), EVERYTHING):
        module = TrainedLinear(scheme, stage, tensors, SHAPE, train)
        (module() * wanted).sum().backward()
        grads.append({name: parameter.grad for name, _, parameter in module.trained()})
    assert grads[0]["weight.log_scales"] is not None and bool(grads[0]["weight.log_scales"].any())
    torch.testing.assert_close(grads[1]["weight.log_scales"], grads[0]["weight.log_scales"])
    zeros = grads[1]["weight.zero_shift"]
    assert zeros is not None and not bool(zeros.any())  # nothing is cut off at the start


def test_gradients_reach_codes_that_are_not_cut_off() -> None:
    stage, scheme, tensors = stored("integers")
    module = TrainedLinear(scheme, stage, tensors, SHAPE, ("weights",))
    ((_, _, steps),) = module.trained()
    with torch.no_grad():
        steps[0] += 100
    module().sum().backward()
    assert steps.grad is not None
    assert not bool(steps.grad[0].any())
    quantized = unpack_weight(scheme, tensors, SHAPE).quantized
    assert quantized is not None
    torch.testing.assert_close(steps.grad[1:, :, 0], quantized.scales[1:].float())


@pytest.mark.parametrize("name", ["two_four", "integers", "int8", "groups", "branch"])
def test_plans_count_the_bytes_that_are_held(name: str) -> None:
    stage, scheme, tensors = stored(name)
    stages = {"a.down_proj": stage}
    work = Workload([{"a.down_proj": SHAPE}], stages, 8, 8, 2, 1, 1, 8, 0.0)
    for train in (("weights", "scales", "branch"), ("scales", "zeros", "branch")):
        codes = tuple(part for part in train if part != "weights" or scheme.integers is None)
        module = TrainedLinear(scheme, stage, tensors, SHAPE, codes)
        trained = sum(parameter.numel() for _, _, parameter in module.trained())
        assert numbers(work, "a.down_proj", SHAPE, train, frozen=True) == trained
        kept = [value for value in vars(module.weight).values() if isinstance(value, Tensor)]
        real = sum(tensor.nbytes for tensor in kept)
        padded = 1.25 if scheme.integers is not None else 1.0  # a short last group
        assert real <= padded * held(work, "a.down_proj", SHAPE, train) <= 1.6 * real


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bit_weights_start_exactly_in_every_dtype(dtype: torch.dtype) -> None:
    stage, scheme, tensors = stored("two_four", dtype)
    module = TrainedLinear(scheme, stage, tensors, SHAPE, ("weights",))
    assert same(module.stored(tensors), tensors)
    assert isinstance(module.weight, FloatWeight)


def test_the_unit_is_a_power_of_two_near_the_root_mean_square() -> None:
    weight = 0.03 * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert unit_of(weight) == 2.0**-5
    assert unit_of(torch.zeros(4)) == 1.0
    assert unit_of(torch.tensor([0.0, 0.0, 4.0])) == 4.0
