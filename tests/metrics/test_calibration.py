"""Calibration from confidences, trust, and the temperature that a teacher is re-calibrated with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import ConfigError, DataError
from limbeck.losses.first import recalibrate, top_probabilities
from limbeck.metrics import calibration

seeds = st.integers(0, 2**31)


@given(seeds, st.integers(1, 20))
def test_confidences_of_logits_give_the_same_bins(seed: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (30,), generator=generator)
    confidence, guess = logits.softmax(-1).max(-1)
    right = guess == labels
    found = calibration.confidence_error(confidence, right, bins)
    assert found == pytest.approx(calibration.ece(logits, labels, bins))
    assert 0 <= found <= 1
    share = float(right.double().mean())
    assert calibration.trust(confidence, right, bins) == pytest.approx(share - found)


def test_a_sure_model_errs_by_its_mistakes() -> None:
    right = torch.tensor([1, 1, 0, 1])
    assert calibration.confidence_error(torch.ones(4), right, 10) == pytest.approx(0.25)
    even = torch.full((4,), 0.75)
    assert calibration.confidence_error(even, right, 10) == pytest.approx(0)
    assert calibration.trust(even, right) == pytest.approx(0.75)


def test_edges_belong_to_the_lower_bin_and_zero_to_none() -> None:
    confidence = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.7, 1.0], dtype=torch.float64)
    counts = [b["count"] for b in calibration.confidence_bins(confidence, torch.ones(6), 10)]
    assert counts == [1, 1, 1, 0, 0, 0, 1, 0, 0, 1]


@given(seeds, st.sampled_from(["probability", "power"]))
def test_the_temperature_is_the_best_of_the_grid(seed: int, scaling: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, probs = top_probabilities(3 * torch.randn(40, 20, generator=generator), 5)
    answers = torch.randint(-1, 5, (40,), generator=generator)
    grid = [0.1, 0.5, 1.0, 1.0, 3.0]
    found = calibration.choose_temperature(probs, answers, grid, scaling=scaling)  # type: ignore[arg-type]
    assert found.c == grid[found.errors.index(min(found.errors))]
    order = torch.randperm(40, generator=generator)
    again = calibration.choose_temperature(probs[order], answers[order], grid, scaling=scaling)  # type: ignore[arg-type]
    assert again.errors == pytest.approx(found.errors)
    guesses = [recalibrate(probs, scaling, c).argmax(-1) for c in grid]  # type: ignore[arg-type]
    assert all((guess == 0).all() for guess in guesses)  # scaling never changes the answer


def test_an_over_confident_teacher_is_heated() -> None:
    probs = torch.tensor([[0.97, 0.02, 0.01]]).repeat(100, 1)
    answers = torch.tensor([0] * 60 + [1] * 30 + [-1] * 10)
    found = calibration.choose_temperature(probs, answers, [0.5, 1.0, 2.0, 3.0, 4.0])
    assert found.c > 1
    assert min(found.errors) < found.errors[1] / 2


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="grid"):
        calibration.choose_temperature(torch.ones(2, 3), torch.zeros(2), [])
    with pytest.raises(ConfigError, match="c is 0"):
        calibration.choose_temperature(torch.ones(2, 3), torch.zeros(2), [0.0])
    with pytest.raises(DataError, match="0 samples"):
        calibration.confidence_error(torch.empty(0), torch.empty(0))
