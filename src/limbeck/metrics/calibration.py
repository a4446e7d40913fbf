"""How far predicted probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ConfigError, DataError
from limbeck.losses.first import Scaling, recalibrate


class Bin(TypedDict):
    """One bar of a reliability diagram: mean confidence and accuracy in 0 .. 1, and how many samples."""

    confidence: float
    accuracy: float
    count: int


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> list[Bin]:
    """Samples by the probability of their predicted class, in ``bins`` equal steps of (0, 1].

    An empty bin has count 0 and confidence and accuracy 0.

    Args:
        logits: [N, C].
        labels: class ids [N].
        bins: how many, >= 1.

    Raises:
        DataError: there are no samples.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 2.
    """
    confidence, guess = _log_probabilities(logits).exp().max(-1)
    return confidence_bins(confidence, guess == labels, bins)


def confidence_bins(confidence: Tensor, correct: Tensor, bins: int) -> list[Bin]:
    """Answers by their confidence, in ``bins`` equal steps (low, high] of (0, 1]; a 0 is in none.

    Args:
        confidence: in 0 .. 1, [N].
        correct: nonzero where the answer is right, [N].
        bins: how many, >= 1.

    Raises:
        DataError: there are no answers.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), section 2.
    """
    if not len(confidence):
        raise DataError("calibration over 0 samples: give at least one")
    sure, right = confidence.double().cpu(), correct.double().cpu()
    place = torch.bucketize(sure, torch.linspace(0, 1, bins + 1, dtype=torch.float64)).clamp(max=bins)
    sums = (torch.bincount(place, x, bins + 1)[1:].tolist() for x in (torch.ones_like(sure), right, sure))
    return [
        Bin(confidence=mass / max(n, 1), accuracy=hits / max(n, 1), count=int(n))
        for n, hits, mass in zip(*sums, strict=True)
    ]


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in 0 .. 1: mean gap between confidence and accuracy, weighted by count.

    Arguments and errors as ``reliability``.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
    """
    return _mean_gap(reliability(logits, labels, bins), len(labels))


def confidence_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in 0 .. 1, from confidences; arguments and errors as ``confidence_bins``.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
    """
    return _mean_gap(confidence_bins(confidence, correct, bins), len(confidence))


def trust(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Accuracy - expected calibration error, in -1 .. 1; arguments and errors as ``confidence_bins``.

    Source: FIRST (arXiv 2408.12168), trust score.
    """
    return float(correct.double().mean()) - confidence_error(confidence, correct, bins)


@dataclass(frozen=True)
class ChosenTemperature:
    """The temperature whose re-calibrated answers have the smallest calibration error.

    Attributes:
        c: the first such one of the grid.
        errors: the calibration error at each of the grid.
    """

    c: float
    errors: tuple[float, ...]


def choose_temperature(
    probs: Tensor, answers: Tensor, grid: Sequence[float], *, scaling: Scaling = "power", bins: int = 10
) -> ChosenTemperature:
    """The temperature of ``recalibrate`` that makes the teacher's probabilities tell how often it is right.

    The confidence is the largest re-calibrated probability; the answer is right where that is the right
    token's. Take samples that the teacher did not learn from: on those it is no measure.

    Args:
        probs: of the kept tokens [N, K].
        answers: which of the K is right, [N] int64; -1 where none is.
        grid: temperatures > 0.
        scaling: see ``recalibrate``.
        bins: of the calibration error.

    Raises:
        ConfigError: an empty grid, or what ``recalibrate`` refuses.
        DataError: there are no samples.

    Source: FIRST (arXiv 2408.12168), trustworthy maximisation.
    """
    if not len(grid):
        raise ConfigError("the grid of temperatures is empty: give at least one")
    errors = []
    for c in grid:
        confidence, guess = recalibrate(probs, scaling, c).max(-1)
        errors.append(confidence_error(confidence, guess == answers, bins))
    return ChosenTemperature(grid[errors.index(min(errors))], tuple(errors))


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels [N] under ``logits`` [N, C], in nats.

    Raises:
        DataError: there are no samples.
    """
    return -float(_log_probabilities(logits).gather(-1, labels[:, None]).mean())


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean over samples of Σ_k (p_k - [k = label])², in 0 .. 2, for ``logits`` [N, C] and ``labels`` [N].

    Raises:
        DataError: there are no samples.

    Source: Brier 1950, Monthly Weather Review 78.
    """
    error = _log_probabilities(logits).exp() - F.one_hot(labels, logits.shape[-1])
    return float(error.square().sum(-1).mean())


def _mean_gap(bins: Sequence[Bin], total: int) -> float:
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total


def _log_probabilities(logits: Tensor) -> Tensor:
    if not len(logits):
        raise DataError("calibration over 0 samples: give at least one")
    return logits.double().log_softmax(-1)
