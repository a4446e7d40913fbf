"""How far predicted probabilities can be trusted."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import DataError


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
    place = (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    right = torch.bincount(place, (guess == labels).double(), minlength=bins)
    sure = torch.bincount(place, confidence, minlength=bins)
    found = []
    for n, hits, mass in zip(count.tolist(), right.tolist(), sure.tolist(), strict=True):
        found.append(Bin(confidence=mass / max(n, 1), accuracy=hits / max(n, 1), count=n))
    return found


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in 0 .. 1: mean gap between confidence and accuracy, weighted by count.

    Arguments and errors as ``reliability``.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3.
    """
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(logits, labels, bins)]
    return sum(gaps) / len(labels)


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


def _log_probabilities(logits: Tensor) -> Tensor:
    if not len(logits):
        raise DataError("calibration over 0 samples: give at least one")
    return logits.double().log_softmax(-1)
