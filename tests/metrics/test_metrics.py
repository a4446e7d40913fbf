"""Accuracy, calibration, fidelity and cost against other ways to the same figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor, nn

from limbeck.errors import ConfigError, DataError, ShapeError
from limbeck.metrics import accuracy, calibration, cost, fidelity

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(seed: int, count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


# accuracy


def test_accuracy_of_ids_and_of_logits() -> None:
    logits, labels = torch.tensor([[2.0, 1], [0, 1], [3, 1], [0, 1]]), torch.tensor([0, 1, 1, 1])
    assert accuracy.accuracy(logits, labels) == accuracy.accuracy(logits.argmax(-1), labels) == 75


def test_wilson_at_a_known_value() -> None:
    # 8 of 10 at 95 %: (49.02, 94.33) in Newcombe 1998's tables.
    low, high = accuracy.wilson(8, 10)
    assert low == pytest.approx(49.02, abs=0.01)
    assert high == pytest.approx(94.33, abs=0.01)


@given(st.integers(1, 500), st.floats(0, 1))
def test_interval_of_one_part_is_wilsons(total: int, share: float) -> None:
    correct = round(share * total)
    np.testing.assert_allclose(accuracy.average_interval([correct], [total]), accuracy.wilson(correct, total))


def test_more_parts_narrow_the_interval() -> None:
    low, high = accuracy.average_interval([80] * 4, [100] * 4)
    one_low, one_high = accuracy.wilson(80, 100)
    assert high - low == pytest.approx((one_high - one_low) / 2)
    assert low < 80 < high


def test_confusion_has_true_classes_in_rows() -> None:
    counts = accuracy.confusion(torch.tensor([0, 2, 2]), torch.tensor([0, 1, 2]), 4)
    assert counts == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert accuracy.confusion(torch.empty(0).long(), torch.empty(0).long(), 2) == [[0, 0], [0, 0]]


def test_wrong_counts_are_named() -> None:
    with pytest.raises(DataError, match=r"label lies outside 0\.\.1"):
        accuracy.confusion(torch.tensor([0]), torch.tensor([2]), 2)
    with pytest.raises(DataError, match="0 samples"):
        accuracy.accuracy(torch.empty(0, 2), torch.empty(0))
    with pytest.raises(ShapeError, match="2 predictions but 3 labels"):
        accuracy.accuracy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(DataError, match="5 right of 4"):
        accuracy.wilson(5, 4)
    with pytest.raises(DataError, match="2 counts"):
        accuracy.average_interval([1, 2], [3])


# calibration


@given(seeds)
def test_nll_and_brier_agree_with_sklearn(seed: int) -> None:
    logits, labels = draw(seed, 20, 5), labels_of(seed, 20, 5)
    probabilities = logits.double().softmax(-1).numpy()
    assert calibration.nll(logits, labels) == pytest.approx(log_loss(labels, probabilities, labels=range(5)))
    expected = brier_score_loss(labels, probabilities, labels=range(5), scale_by_half=False)
    assert calibration.brier(logits, labels) == pytest.approx(expected)


def test_ece_of_a_sure_network_is_its_error() -> None:
    logits, labels = torch.tensor([[100.0, 0], [100, 0], [0, 100], [0, 100]]), torch.tensor([0, 0, 1, 0])
    assert calibration.ece(logits, labels) == pytest.approx(0.25)
    *empty, last = calibration.reliability(logits, labels)
    assert last == {"confidence": pytest.approx(1), "accuracy": 0.75, "count": 4}
    assert len(empty) == 14
    assert all(b == {"confidence": 0, "accuracy": 0, "count": 0} for b in empty)


@given(seeds, st.integers(1, 20))
def test_bins_hold_every_sample_between_their_edges(seed: int, bins: int) -> None:
    logits, labels = draw(seed, 30, 4), labels_of(seed, 30, 4)
    found = calibration.reliability(logits, labels, bins)
    assert sum(b["count"] for b in found) == 30
    for i, b in enumerate(found):
        if b["count"]:
            assert i / bins - 1e-9 <= b["confidence"] <= (i + 1) / bins + 1e-9
    assert 0 <= calibration.ece(logits, labels, bins) <= 1


def test_calibration_needs_samples() -> None:
    with pytest.raises(DataError, match="0 samples"):
        calibration.ece(torch.empty(0, 3), torch.empty(0).long())


# fidelity


def test_agreement_and_kl() -> None:
    student, teacher = torch.tensor([[2.0, 0], [0, 2]]), torch.tensor([[1.0, 0], [1, 0]])
    assert fidelity.agreement(student, teacher) == 50
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert fidelity.predictive_kl(student, teacher) == pytest.approx(float(expected), rel=1e-5)
    assert fidelity.predictive_kl(teacher, teacher) == pytest.approx(0, abs=1e-12)


@given(seeds, st.floats(0.1, 10))
def test_cka_ignores_rotation_and_scale(seed: int, scale: float) -> None:
    features = draw(seed, 12, 4).double()
    rotation, _ = torch.linalg.qr(draw(seed + 1, 4, 4).double())
    assert fidelity.linear_cka(features, scale * features @ rotation + 3) == pytest.approx(1)
    other = fidelity.linear_cka(features, draw(seed + 2, 12, 7))
    assert 0 <= other <= 1 + 1e-9
    assert other == pytest.approx(fidelity.linear_cka(draw(seed + 2, 12, 7), features))


@given(seeds)
def test_rank_correlation_agrees_with_scipy(seed: int) -> None:
    student, teacher = draw(seed, 6, 5).round(), draw(seed + 1, 6, 5)
    student[:, 0] = 9  # some are tied, never all
    expected = np.mean([spearmanr(s, t).statistic for s, t in zip(student, teacher, strict=True)])
    assert fidelity.rank_correlation(student, teacher) == pytest.approx(expected, abs=1e-6)
    assert fidelity.rank_correlation(teacher, 3 * teacher.exp()) == pytest.approx(1)
    assert fidelity.rank_correlation(teacher, -teacher) == pytest.approx(-1)


def test_rank_correlation_where_there_is_little_order() -> None:
    two = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    assert fidelity.rank_correlation(two, torch.tensor([[3.0, 2], [2, 3], [3, 2], [2, 2]])) == pytest.approx(
        0.25
    )
    assert fidelity.rank_correlation(torch.ones(3, 4), draw(0, 3, 4)) == 0
    assert fidelity.rank_correlation(draw(0, 3, 1), draw(1, 3, 1)) == 0
    with pytest.raises(ShapeError, match=r"\[2, 3\].*\[2, 4\]"):
        fidelity.rank_correlation(torch.zeros(2, 3), torch.zeros(2, 4))


def test_cka_of_a_constant_is_zero() -> None:
    assert fidelity.linear_cka(torch.ones(5, 3), draw(0, 5, 3)) == 0


def test_fidelity_needs_one_shape() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3\].*\[2, 4\]"):
        fidelity.agreement(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="same N samples"):
        fidelity.linear_cka(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(DataError, match="0 samples"):
        fidelity.agreement(torch.zeros(0, 3), torch.zeros(0, 3))


# cost


def test_cost_of_a_linear_map_and_of_attention() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).requires_grad_(False)
    module[1].requires_grad_(True)
    assert cost.parameters(module) == 6 * 4 + 4 + 4 * 2 + 2
    assert cost.parameters(module, trainable=True) == 4 * 2 + 2
    assert cost.multiply_adds(lambda: module(torch.zeros(3, 6))) == 3 * (6 * 4 + 4 * 2)
    q = torch.zeros(2, 3, 5, 8)
    assert cost.multiply_adds(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 3 * 5 * 5 * 8


def test_latency_calls_as_often_as_it_says() -> None:
    calls: list[bool] = []
    milliseconds = cost.latency(lambda: calls.append(torch.is_grad_enabled()), warm_up=2, repeats=5)
    assert len(calls) == 7
    assert not any(calls)
    assert milliseconds >= 0
    with pytest.raises(ConfigError, match="repeats"):
        cost.latency(lambda: None, repeats=0)
