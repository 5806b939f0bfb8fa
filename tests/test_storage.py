"""Every storage in the compressed module: packing, forward, dtype changes, copies, hostile tensors."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfweight.serving import storage
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import ArtifactConfig, IntegerScheme, LinearScheme
from halfweight.triton_kernels.formats import FormatError, integers
from halfweight.triton_kernels.formats.integers import Quantized

N, K = 24, 72  # K is no multiple of 64: the last group of 64 is short


def ints(
    size: int, bits: int = 4, symmetric: bool = False, along: Literal["inputs", "outputs"] = "inputs"
) -> IntegerScheme:
    return IntegerScheme(bits=bits, group_size=size, symmetric=symmetric, along=along)


SCHEMES = {
    "2:4": LinearScheme(pattern="2:4", density=0.5),
    "int4 asymmetric": LinearScheme(pattern="dense", density=1, integers=ints(32)),
    "int4 symmetric": LinearScheme(pattern="dense", density=1, integers=ints(64, symmetric=True)),
    "int8": LinearScheme(pattern="dense", density=1, integers=ints(24, bits=8)),
    "2:4 int4": LinearScheme(pattern="2:4", density=0.5, integers=ints(32)),
    "2:4 int8": LinearScheme(pattern="2:4", density=0.5, integers=ints(32, bits=8)),
    "4:8 int4": LinearScheme(pattern="4:8", density=0.5, integers=ints(32, symmetric=True)),
    "1x8": LinearScheme(pattern="1x8", density=5 / 9, integers=ints(8), kept=5),
    "1x16": LinearScheme(pattern="1x16", density=0.4, integers=ints(16, symmetric=True), kept=2),
    "int4 along outputs": LinearScheme(pattern="dense", density=1, integers=ints(16, along="outputs")),
    "int8 along outputs": LinearScheme(pattern="dense", density=1, integers=ints(16, bits=8, along="outputs")),
    "8x1": LinearScheme(pattern="8x1", density=2 / 3, integers=ints(8, along="outputs"), kept=2),
    "1x8 layer": LinearScheme(pattern="1x8", density=0.5, integers=ints(8), kept=N * 9 // 2, balance="layer"),
}


def mask_for(scheme: LinearScheme, generator: torch.Generator) -> Tensor:
    """A random mask of the scheme's pattern: `[N, K]`, or `[K, N]` of an input-major one."""
    rows, columns = (K, N) if scheme.input_major else (N, K)
    if scheme.group is not None:
        total = -(-columns // scheme.group)
        score = torch.rand(rows, total, generator=generator)
        if scheme.balance == "layer":
            alive = score >= score.flatten().topk(scheme.kept or 0).values.min()
        else:
            alive = torch.zeros(rows, total, dtype=torch.bool).scatter_(1, score.topk(scheme.kept or 0).indices, True)
        return alive.repeat_interleave(scheme.group, 1)[:, :columns]
    if scheme.pattern == "dense":
        return torch.ones(rows, columns, dtype=torch.bool)
    n, m = (int(part) for part in scheme.pattern.split(":"))
    score = torch.rand(N, K // m, m, generator=generator)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(n).indices, True).flatten(1)


def packed(scheme: LinearScheme, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a random weight, and the dense weight they stand for, computed here on its own (fp32)."""
    generator = torch.Generator().manual_seed(seed)
    mask = mask_for(scheme, generator)
    if scheme.integers is None:
        weight = torch.randn(N, K, generator=generator).bfloat16() * mask
        return storage.pack_weight(weight, scheme), weight.float()
    size, bits = scheme.integers.group_size, scheme.integers.bits
    rows, columns = mask.shape
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).half()
    zeros = None
    if not scheme.integers.symmetric:
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    spread = torch.arange(columns) // size
    zero = zeros[:, spread].float() if zeros is not None else float(integers.middle(bits))
    dense = (codes.float() - zero) * scales.float()[:, spread] * mask
    if scheme.input_major:
        dense, mask = dense.T, mask.T
    return storage.pack_weight(dense, scheme, Quantized(codes, scales, zeros), mask), dense


def module(scheme: LinearScheme, tensors: dict[str, Tensor], bias: Tensor | None = None) -> CompressedLinear:
    made = CompressedLinear(scheme, K, N, bias is not None, dtype=torch.bfloat16)
    made.load_state_dict(tensors if bias is None else {**tensors, "bias": bias})
    return made.requires_grad_(False)


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES.keys())
def scheme(request: pytest.FixtureRequest) -> LinearScheme:
    chosen: LinearScheme = request.param
    return chosen


def test_stored_tensors_stand_for_the_weight(scheme: LinearScheme) -> None:
    tensors, dense = packed(scheme)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype or torch.bfloat16) for name, spec in storage.tensor_specs(scheme, (N, K)).items()
    }
    storage.validate(scheme, tensors, (N, K))
    torch.testing.assert_close(storage.dense_weight(scheme, tensors, (N, K), torch.float32), dense, rtol=0, atol=0)
    bits = storage.stored_bits(scheme, (N, K), torch.bfloat16)
    assert bits == 8 * sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 5), (70,)])
def test_forward_is_the_dense_linear(scheme: LinearScheme, leading: tuple[int, ...]) -> None:
    tensors, dense = packed(scheme)
    bias = torch.randn(N).bfloat16()
    x = torch.randn(*leading, K)
    got = module(scheme, tensors, bias).to(torch.float32)(x)
    want = F.linear(x.double(), dense.double(), bias.double())
    assert got.shape == want.shape and got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_stored_form_survives_use_dtype_changes_and_copies(scheme: LinearScheme) -> None:
    tensors, _ = packed(scheme)
    made = module(scheme, tensors)
    x = torch.randn(2, K)
    before = made.to(torch.float32)(x)  # prepares
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), before)
    for dtype in (torch.float16, torch.bfloat16):
        made = made.to(dtype)
        made(x.to(dtype))
        for name, tensor in made.state_dict().items():
            if not tensor.is_floating_point():  # values of a 16-bit scheme are the model's own and follow its dtype
                assert torch.equal(tensor, tensors[name]), name


def test_tokens_do_not_see_each_other(scheme: LinearScheme) -> None:
    made = module(scheme, packed(scheme)[0]).to(torch.float32)
    x = torch.randn(4, K)
    x[1] = float("nan")
    got = made(x)
    assert bool(torch.isfinite(got[[0, 2, 3]]).all()) and not bool(torch.isfinite(got[1]).any())


def test_damaged_tensors_are_refused(scheme: LinearScheme) -> None:
    tensors, _ = packed(scheme)
    for name in tensors:
        short = {**tensors, name: tensors[name][:-1]}
        with pytest.raises(FormatError, match=name):
            storage.validate(scheme, short, (N, K))


def test_schemes_survive_json(scheme: LinearScheme) -> None:
    config = ArtifactConfig(linears={"layer": scheme})
    assert ArtifactConfig.parse(config.to_json(), "config.json") == config


OUTPUTS = {"group_size": 16, "along": "outputs"}
BRANCH = {"rank": 1, "integers": {"group_size": 16, "symmetric": True}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "1x16", "density": 0.5}, "needs int4 integers and the number of kept groups"),
        ({"pattern": "1x12", "density": 0.5}, "groups have 8, 16, 32, 64 inputs"),
        ({"pattern": "1x16", "density": 0.5, "kept": 1, "integers": {"group_size": 32}}, "group_size 16"),
        ({"pattern": "2:4", "density": 0.5, "segments": 2}, "no kept groups, segments or balance"),
        ({"pattern": "dense", "density": 1, "integers": {"bits": 5, "group_size": 32}}, "bits"),
        (
            {"pattern": "16x1", "density": 0.5, "kept": 1, "integers": {"group_size": 16}},
            "needs integers along outputs",
        ),
        ({"pattern": "12x1", "density": 0.5}, "groups have 8, 16, 32, 64 outputs"),
        ({"pattern": "1x16", "density": 0.5, "kept": 1, "integers": OUTPUTS}, "along outputs it is 16x1"),
        ({"pattern": "16x1", "density": 0.5, "kept": 2, "segments": 2, "integers": OUTPUTS}, "neither segments"),
        ({"pattern": "dense", "density": 1, "selection": {}, "integers": {"group_size": 16}}, "along outputs"),
        ({"pattern": "dense", "density": 1, "selection": {}, "low_rank": BRANCH}, "is 16-bit"),
        ({"pattern": "dense", "density": 1, "low_rank": {"rank": 1}}, "gain nothing"),
    ],
)
def test_contradicting_schemes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearScheme.model_validate(fields)
