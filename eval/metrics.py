"""Metrics of the compression literature as pure functions on tensors and numbers; each says its formula and source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error of predictions with `confidence` `[n]` in [0, 1] that were `correct` `[n]` (bool).

    Confidences fall into `bins` equal bins (lower, upper]; ECE = sum over bins of (bin's share of all predictions) *
    |its mean correctness - its mean confidence| (Guo et al. 2017, arXiv 1706.04599, eq. 3; 15 bins as there). All
    predictions are binned together: a mean of the batches' errors would be another, larger number.
    """
    confidence, hits = confidence.flatten().double(), correct.flatten().double()
    if not len(confidence):
        raise ValueError("no predictions to measure a calibration error on")
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add(0, index, hits - confidence)
    return float(gap.abs().sum()) / len(confidence)


def choice_confidence(log_likelihoods: Sequence[float]) -> tuple[int, float]:
    """The option a multiple-choice answer picks, and its share of the softmax over the options' log-likelihoods."""
    probabilities = torch.tensor(log_likelihoods, dtype=torch.float64).softmax(0)
    best = int(probabilities.argmax())
    return best, float(probabilities[best])


def kl_divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) per token, nats, fp32 `[...]`, from logits `[..., V]`: sum_v p_v (log p_v - log q_v).

    The dense model is p, as in llama.cpp's KL tables and EvoPress (arXiv 2410.14649): a token the dense model finds
    likely and the other does not costs most.
    """
    p, q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def token_agreement(dense: Tensor, other: Tensor) -> Tensor:
    """Whether both models' most likely next token is the same, bool `[...]`, from logits `[..., V]`."""
    return dense.argmax(-1) == other.argmax(-1)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two generations share before they first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def output_error(dense: Tensor, other: Tensor) -> float:
    """||other - dense||^2 / ||dense||^2 of two outputs of the same shape: what layer-wise compression minimises
    (SparseGPT, arXiv 2301.00774, eq. 1, over the norm of the output). 0 when both are zero."""
    lost, wanted = (float(x.double().square().sum()) for x in (other.float() - dense.float(), dense.float()))
    return lost / wanted if wanted else (math.inf if lost else 0.0)


def non_zero_share(activations: Tensor) -> float:
    """Share of exactly non-zero entries (Lazy Neuron, Li et al. 2022, arXiv 2210.06313: of an FFN's hidden layer).

    Activation functions without a flat part, such as SiLU, give 1: see `cett` for those.
    """
    return int(activations.count_nonzero()) / activations.numel()


def cett(x: Tensor, weight: Tensor, threshold: float, norms: Tensor | None = None) -> tuple[float, float]:
    """Cumulative errors of tail truncation at `threshold`, and the share of active neurons (Sparsing Law, Luo et al.
    2024, arXiv 2411.02335, section 3.1).

    `x` `[tokens, F]` are the inputs of an FFN's output linear `weight` `[N, F]`; neuron i gives x_i * weight[:, i], of
    size |x_i| * c_i with c_i = ||weight[:, i]||_2 (`norms` `[F]`, computed when not given). A neuron is inactive for a
    token when that is below the threshold. CETT = mean over tokens of ||sum of the inactive neurons' outputs|| /
    ||weight x||; tokens whose output is zero count as 0.
    """
    norms = weight.norm(dim=0) if norms is None else norms
    inactive = x.abs() * norms < threshold
    lost, whole = ((part @ weight.T).norm(dim=1) for part in (x * inactive, x))
    error = torch.where(whole > 0, lost / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)
    return float(error.mean()), 1 - float(inactive.float().mean())


def tolerance_knee(sparsity: Sequence[float], ratio: Sequence[float], tolerance: float) -> float:
    """The largest sparsity up to which the perplexity `ratio` to the dense model stays within 1 + `tolerance`.

    Essential sparsity (Jaiswal et al. 2023, arXiv 2306.03805) asks how much can be removed before quality drops; this
    is its reading with a stated tolerance. The points lie in order of sparsity, 0 (ratio 1) need not be among them. A
    later point that happens to be within the tolerance again does not count, and nothing is interpolated: the answer
    is a measured point, or 0.
    """
    points = sorted(zip(sparsity, ratio, strict=True))
    knee = 0.0
    for level, value in points:
        if not value <= 1 + tolerance:
            break
        knee = level
    return knee


def shape_knee(sparsity: Sequence[float], ratio: Sequence[float]) -> float:
    """The sparsity at which log perplexity bends most: the point farthest below the chord from the dense model (0, 1)
    to the last point, both axes scaled to 1 (Kneedle, Satopaa et al. 2011, section III).

    It depends on where the grid ends, so compare curves over the same grid. Raises ValueError for fewer than two points
    above 0.
    """
    points = [(0.0, 0.0), *sorted((s, math.log(r)) for s, r in zip(sparsity, ratio, strict=True) if s > 0)]
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 3:
        raise ValueError("a knee needs at least two points above sparsity 0")
    (last_x, last_y) = points[-1]
    return max(points, key=lambda point: (point[0] / last_x - point[1] / last_y) if last_y > 0 else 0.0)[0]
