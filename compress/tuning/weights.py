"""Compressed linears that can be trained: what is stored, as a differentiable function of what is trained.

Parameters are relative to where they start (a weight counts in steps of its grid, a scale in its own logarithm), so
that one learning rate fits every layer. What has to be rounded for storage is rounded in the forward pass and passed
straight through in the backward pass (Bengio et al. 2013, arXiv 1308.3432; for grids: Esser et al. 2019, arXiv
1902.08153), so the weight that is trained is bit for bit the weight that is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...serving.checkpoint import TensorInfo
from ...serving.scheme import LinearScheme
from ...serving.storage import effective_weight
from ...triton_kernels.formats.integers import Quantized
from ..passes.base import IntegerSettings, StageConfig
from ..passes.quantization import CodeRange, split_groups
from .config import Part
from .logical import Logical, pack_logical, unpack_weight

Trained = Iterator[tuple[str, Part, nn.Parameter]]
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive numbers of fp16
_WITHIN = 0.45  # steps that a weight may start from the code that it rounds to


class _RoundTo(torch.autograd.Function):
    """`x` rounded to a dtype's numbers, in fp32; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Centered(torch.autograd.Function):
    """`steps` `[N, J, G]` from zero points `zeros` `[N, J, 1]`, rounded and cut to the codes `low` to `high`, less the
    zero points.

    Gradients pass where nothing is cut off; there a zero point makes no difference, and elsewhere it shifts the end of
    the range.
    """

    @staticmethod
    def forward(ctx: Any, steps: Tensor, zeros: Tensor, low: float, high: float) -> Tensor:
        codes = (steps + zeros).round_()
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp_(low, high).sub_(zeros)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (inside,) = ctx.saved_tensors
        passed = grads[0] * inside
        shifted = (passed - grads[0]).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return passed, shifted, None, None


class IntegerWeight(nn.Module):
    """`mask * scale * (code - zero)` `[N, K]`, with codes, scales and zero points trained as asked."""

    def __init__(
        self,
        logical: Logical,
        allowed: CodeRange,
        group_size: int,
        middle: int,
        train: Collection[Part],
        origin: Tensor | None = None,
        unit: float = 1.0,
    ) -> None:
        """`logical` holds quantized numbers; codes stay within `allowed`; `middle` is the zero point of symmetric ones.

        Codes are only trained with `weights` in `train`, as so many `unit`. Then each starts as far from its neighbours
        as `origin` `[N, K]`, the weight before it was rounded, is: in the middle all would be equally far, and change
        together.
        """
        super().__init__()
        assert logical.quantized is not None
        codes, scales, zeros = logical.quantized
        self.columns, self.allowed, self.unit = codes.shape[1], allowed, unit
        whole = torch.full_like(scales, middle) if zeros is None else zeros
        self._base, self._zeros = scales[..., None], whole[..., None]
        # A short last group is padded with its zero point, and so with zeros here.
        spread = torch.arange(self.columns, device=codes.device) // group_size
        steps = split_groups(codes.short() - whole.short()[:, spread], group_size)
        moves = "zeros" in train and allowed.zero is None
        # A frozen code at a frozen zero point is zero already.
        masked = logical.mask is not None and (moves or "weights" in train)
        self._kept = split_groups(logical.mask, group_size) if masked and logical.mask is not None else None
        self.steps = nn.Parameter(steps.float()) if "weights" in train else None
        if origin is not None and self.steps is not None:
            wanted = split_groups(origin.float(), group_size) / self._base.float().clamp(min=_SMALLEST)
            self.steps.data.add_((wanted - self.steps.data).clamp_(-_WITHIN, _WITHIN))
        if self.steps is not None:
            self.steps.data.div_(unit)
        self._frozen = None if "weights" in train else steps.to(torch.int8 if allowed.high < 128 else torch.int16)
        self.log_scales = nn.Parameter(torch.zeros_like(self._base, dtype=torch.float32)) if "scales" in train else None
        self.zero_shift = nn.Parameter(torch.zeros_like(self._base, dtype=torch.float32)) if moves else None

    def trained(self) -> Trained:
        """`(name, part, parameter)` of everything that is trained."""
        parts: tuple[tuple[str, Part, nn.Parameter | None], ...] = (
            ("steps", "weights", self.steps),
            ("log_scales", "scales", self.log_scales),
            ("zero_shift", "zeros", self.zero_shift),
        )
        yield from ((name, part, parameter) for name, part, parameter in parts if parameter is not None)

    def forward(self) -> Tensor:
        """The weight `[N, K]`, fp32."""
        scales = self._scales()
        values = self._centered() * scales
        if self._kept is not None:
            values = values * self._kept
        return values.flatten(-2)[:, : self.columns]

    @torch.no_grad()
    def logical(self, mask: Tensor | None) -> Logical:
        """What `forward` stands for, as it is stored under the `mask` it was made with."""
        scales, zeros = self._scales(), self._whole_zeros()
        codes = (self._centered() + zeros).flatten(-2)[:, : self.columns].to(torch.uint8)
        stored = zeros[..., 0].to(torch.uint8) if self.allowed.zero is None else None
        return Logical(None, Quantized(codes, scales[..., 0].half(), stored), mask)

    def _scales(self) -> Tensor:
        """`[N, J, 1]`, fp32 that fp16 holds."""
        base = self._base.float()
        if self.log_scales is None:
            return base
        return _RoundTo.apply((base * self.log_scales.exp()).clamp(max=_LARGEST), torch.float16)

    def _whole_zeros(self) -> Tensor:
        """`[N, J, 1]`, fp32 whole numbers."""
        zeros = self._zeros.float()
        if self.zero_shift is None:
            return zeros
        moved = (zeros + self.zero_shift).clamp(self.allowed.low, self.allowed.high)
        return moved + (moved.round() - moved).detach()  # exact, as both are small

    def _centered(self) -> Tensor:
        """Codes less their zero points, `[N, J, G]`.

        They do not depend on the scale: under a rounding that passes gradients straight through, a scale that divides
        first would seem to make no difference, and AdamW would walk along the noise of that.
        """
        if self.steps is None:
            assert self._frozen is not None
            if self.zero_shift is None:
                return self._frozen.float()
            return self._frozen + self._zeros.float() - self._whole_zeros()  # the codes themselves stay
        steps = self.steps if self.unit == 1 else self.steps * self.unit
        centered: Tensor = _Centered.apply(steps, self._whole_zeros(), self.allowed.low, self.allowed.high)
        return centered


class FloatWeight(nn.Module):
    """A masked matrix stored in a floating-point dtype, trained in fp32 relative to its root mean square."""

    def __init__(self, logical: Logical, part: Part, train: Collection[Part]) -> None:
        """`part` is what it counts as; it is only trained with that in `train`."""
        super().__init__()
        assert logical.weight is not None
        weight = logical.weight
        self.dtype, self.part, self.size = weight.dtype, part, unit_of(weight)
        self.mask = logical.mask if part in train else None
        # Contiguous: fused AdamW pairs numbers by where they lie, and moments read from a file are contiguous.
        self.values = nn.Parameter((weight.float() / self.size).contiguous()) if part in train else None
        self._frozen = None if part in train else weight

    def trained(self) -> Trained:
        """As `IntegerWeight.trained`."""
        if self.values is not None:
            yield "values", self.part, self.values

    def forward(self) -> Tensor:
        """The matrix, fp32."""
        if self.values is None:
            assert self._frozen is not None
            return self._frozen.float()
        weight: Tensor = _RoundTo.apply(self.values * self.size, self.dtype)
        return weight if self.mask is None else weight * self.mask

    @torch.no_grad()
    def logical(self, mask: Tensor | None) -> Logical:
        """As `IntegerWeight.logical`."""
        return Logical(self().to(self.dtype), None, mask)


class TrainedLinear(nn.Module):
    """One compressed linear `[N, K]` with its low-rank branch; `forward()` is its effective weight."""

    def __init__(
        self,
        scheme: LinearScheme,
        stage: StageConfig,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        train: Collection[Part],
        origin: Tensor | None = None,
        codes: bool = True,
    ) -> None:
        """`tensors` are the stored ones by suffix, `stage` the recipe's stage that made them, `origin` `[N, K]` the
        dense weight. Without `codes` those of the weight stay, whatever `train` says; the branch's are the branch's."""
        super().__init__()
        self.scheme, self.shape = scheme, shape
        plain = scheme.model_copy(update={"low_rank": None})
        bits, symmetric = (stage.bits, stage.symmetric) if isinstance(stage, IntegerSettings) else (8, True)
        if origin is not None and scheme.low_rank is not None:
            without = effective_weight(plain, tensors, shape, torch.float32)
            origin = origin - (effective_weight(scheme, tensors, shape, torch.float32) - without)
        allowed = CodeRange.of(bits, symmetric)
        own = [part for part in train if part != "weights" or codes or scheme.integers is None]
        self.weight = _trainable(plain, tensors, shape, "weights", own, allowed, origin)
        self.v: IntegerWeight | FloatWeight | None = None
        self.u: IntegerWeight | FloatWeight | None = None
        branch = scheme.low_rank
        if branch is None:
            return
        if branch.parts is None:
            self.v = FloatWeight(Logical(tensors["V"][0].T, None, None), "branch", train)
            self.u = FloatWeight(Logical(tensors["U"], None, None), "branch", train)
            return
        assert branch.integers is not None  # it has parts
        (n, k), allowed = shape, CodeRange.of(branch.integers.bits, True)
        inside: list[Part] = ["scales", "weights"] if "branch" in train else []
        v, u = ({m[2:]: t for m, t in tensors.items() if m.startswith(f"{part}.")} for part in "VU")
        self.v = _trainable(branch.parts[0], v, (branch.rank, k), "branch", inside, allowed)
        self.u = _trainable(branch.parts[1], u, (n, branch.rank), "branch", inside, allowed)

    def trained(self) -> Trained:
        """As `IntegerWeight.trained`."""
        yield from ((f"weight.{name}", part, parameter) for name, part, parameter in self.weight.trained())
        for half, module in (("v", self.v), ("u", self.u)):
            if module is not None:
                yield from ((f"{half}.{name}", "branch", parameter) for name, _, parameter in module.trained())

    def forward(self) -> Tensor:
        """The effective weight `[N, K]`, fp32, exactly as `serving.storage.effective_weight` gives it."""
        weight: Tensor = self.weight()
        return weight if self.u is None or self.v is None else torch.addmm(weight, self.u(), self.v())

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to store now, by suffix; `tensors` are those it started from."""
        plain = self.scheme.model_copy(update={"low_rank": None})
        mask = unpack_weight(plain, tensors, self.shape).mask
        packed = pack_logical(plain, self.weight.logical(mask))
        branch = self.scheme.low_rank
        if branch is None or self.v is None or self.u is None:
            return packed
        v, u = self.v.logical(None), self.u.logical(None)
        if branch.parts is None:
            assert v.weight is not None and u.weight is not None
            return packed | {"V": v.weight.T[None].contiguous(), "U": u.weight.contiguous()}
        for name, part, logical in zip("VU", branch.parts, (v, u), strict=True):
            packed |= {f"{name}.{suffix}": tensor for suffix, tensor in pack_logical(part, logical).items()}
        return packed


# What is trained of a block, by parameter name inside it.
Weights: TypeAlias = Mapping[str, TrainedLinear | FloatWeight]


def trainable_weights(
    block: nn.Module,
    prefix: str,
    stages: Mapping[str, StageConfig],
    tensors: Mapping[str, Tensor],
    checkpoint: Mapping[str, TensorInfo],
    train: Collection[Part],
    origins: Mapping[str, Tensor] | None = None,
    codes: bool = True,
) -> dict[str, TrainedLinear | FloatWeight]:
    """What may be trained of the block called `prefix`, by parameter name inside it: its linears in `stages`, whose
    stored forms are among `tensors` (by full name), and with `norms` its norms, in the `checkpoint`'s dtype. `origins`
    are the linears' dense weights, by full name; `codes` is for TrainedLinear."""
    found: dict[str, TrainedLinear | FloatWeight] = {}
    norms: dict[str, TrainedLinear | FloatWeight] = {}
    for inner, module in block.named_modules():
        name, weight = f"{prefix}.{inner}", getattr(module, "weight", None)
        if name in stages and isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            own = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
            origin = (origins or {}).get(name)
            scheme = stages[name].scheme(shape)
            found[f"{inner}.weight"] = TrainedLinear(scheme, stages[name], own, shape, train, origin, codes)
        elif "norms" in train and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            stored = tensors.get(f"{name}.weight", weight).to(checkpoint[f"{name}.weight"].dtype)
            norms[f"{inner}.weight"] = FloatWeight(Logical(stored, None, None), "norms", train)
    return {**found, **norms}


def stored_tensors(weights: Weights, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to store for trained `weights` of the block called `prefix`, by full name; `tensors` are what they started
    from. Trained norms are among them under their own names."""
    packed: dict[str, Tensor] = {}
    for inner, module in weights.items():
        name = f"{prefix}.{inner.removesuffix('.weight')}"
        if isinstance(module, FloatWeight):
            packed[f"{name}.weight"] = module().detach().to(module.dtype)
        else:
            own = {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
            packed |= {f"{name}.{suffix}": tensor for suffix, tensor in module.stored(own).items()}
    return packed


def trained_parameters(weights: Weights) -> dict[str, tuple[Part, nn.Parameter]]:
    """Everything that is trained in `weights`, by full name."""
    return {
        f"{name}.{inner}": (part, parameter)
        for name, module in weights.items()
        for inner, part, parameter in module.trained()
    }


def unit_of(weight: Tensor) -> float:
    """The power of two next to `weight`'s root mean square, so that dividing by it loses nothing; 1 for zeros."""
    mean = float(weight.float().square().sum() / weight.count_nonzero().clamp(min=1))
    return float(2.0 ** round(torch.tensor(mean).log2().item() / 2)) if mean > 0 else 1.0


def _trainable(
    scheme: LinearScheme,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    part: Part,
    train: Collection[Part],
    allowed: CodeRange,
    origin: Tensor | None = None,
) -> IntegerWeight | FloatWeight:
    logical = unpack_weight(scheme, tensors, shape)
    if scheme.integers is None:
        return FloatWeight(logical, part, train)
    middle = 1 << (scheme.integers.bits - 1)
    assert logical.quantized is not None
    unit = unit_of(logical.quantized.codes.float() - middle) if part == "branch" else 1.0
    return IntegerWeight(logical, allowed, scheme.integers.group_size, middle, train, origin, unit)
