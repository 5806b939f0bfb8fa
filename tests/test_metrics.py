"""Metrics against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from halfweight.eval import metrics


def test_calibration_error_of_two_bins_by_hand() -> None:
    # Bin (0.5, 1]: confidences 0.9, 0.7 with one right: |0.5 - 0.8| = 0.3. Bin (0, 0.5]: 0.4, 0.2, one right:
    # |0.5 - 0.3| = 0.2. Each holds half of the predictions.
    confidence = torch.tensor([0.9, 0.7, 0.4, 0.2])
    correct = torch.tensor([True, False, True, False])
    assert metrics.calibration_error(confidence, correct, bins=2) == pytest.approx(0.25)


def test_calibration_bins_close_above_and_hold_both_ends() -> None:
    # 0.5 belongs to the lower of two bins: (0 + 1 right) / 2 there against a mean confidence of 0.25.
    confidence, correct = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([False, True, True])
    assert metrics.calibration_error(confidence, correct, bins=2) == pytest.approx(2 / 3 * 0.25)


def test_sure_and_right_is_calibrated_sure_and_wrong_is_not() -> None:
    assert metrics.calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == 0
    assert metrics.calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == 1
    with pytest.raises(ValueError, match="no predictions"):
        metrics.calibration_error(torch.ones(0), torch.ones(0, dtype=torch.bool))


def test_choice_confidence_is_a_softmax() -> None:
    best, confidence = metrics.choice_confidence([math.log(0.01), math.log(0.03)])
    assert best == 1
    assert confidence == pytest.approx(0.75)


def test_kl_by_hand_and_its_direction() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(metrics.kl_divergence(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert float(metrics.kl_divergence(q, p)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    assert float(metrics.kl_divergence(p, p + 5)) == pytest.approx(0, abs=1e-6)  # logits have no zero point


def test_token_agreement_and_common_prefix() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 3.0]])
    assert metrics.token_agreement(a, b).tolist() == [True, False]
    assert metrics.common_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert metrics.common_prefix([1, 2], [1, 2]) == 2
    assert metrics.common_prefix([5], [6]) == 0


def test_output_error_by_hand() -> None:
    assert metrics.output_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])) == pytest.approx(4 / 25)
    assert metrics.output_error(torch.zeros(2), torch.zeros(2)) == 0
    assert metrics.output_error(torch.zeros(2), torch.ones(2)) == math.inf


def test_non_zero_share_of_relu() -> None:
    assert metrics.non_zero_share(torch.tensor([[-1.0, 2.0], [0.0, -3.0]]).relu()) == 0.25


def test_cett_by_hand() -> None:
    # Columns of length 1 and 5; two tokens. Sizes |x_i| c_i: token 0: 3 and 5, token 1: 4 and 0.
    weight = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    x = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    # Below 3.5: neuron 0 of token 0 (output [3, 0] of [6, 4]), neuron 1 of token 1 (output 0).
    error, active = metrics.cett(x, weight, 3.5)
    assert error == pytest.approx(0.5 * 3 / math.sqrt(52))
    assert active == 0.5
    assert metrics.cett(x, weight, 0.0) == (0.0, 1.0)
    error, active = metrics.cett(x, weight, 100.0)
    assert (error, active) == (pytest.approx(1.0), 0.0)


def test_tolerance_knee_stops_at_the_first_loss() -> None:
    levels, ratios = [0.1, 0.2, 0.3, 0.4, 0.5], [0.999, 1.008, 1.04, 1.2, 1.0]
    assert metrics.tolerance_knee(levels, ratios, 0.01) == 0.2
    assert metrics.tolerance_knee(levels, ratios, 0.05) == 0.3
    assert metrics.tolerance_knee(levels[3:], ratios[3:], 0.05) == 0
    assert metrics.tolerance_knee([0.3, 0.1], [1.5, 1.0], 0.05) == 0.1
    assert metrics.tolerance_knee([0.5], [math.nan], 0.05) == 0


def test_shape_knee_is_the_bend() -> None:
    # log ratio 0, 0, 0, 1, 2 at 0, .25, .5, .75, 1: farthest below the chord at 0.5 (0.5 - 0 of the scaled axes).
    ratios = [1.0, 1.0, math.e, math.e**2]
    assert metrics.shape_knee([0.25, 0.5, 0.75, 1.0], ratios) == 0.5
    with pytest.raises(ValueError, match="two points"):
        metrics.shape_knee([0.0, 0.5], [1.0, 2.0])
