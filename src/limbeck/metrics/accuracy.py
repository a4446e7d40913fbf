"""Accuracy with its interval, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor

from limbeck.errors import DataError, ShapeError


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of right answers, percent.

    Args:
        predictions: class ids [N], or logits [N, C] whose largest column is taken.
        labels: class ids [N].

    Raises:
        ShapeError: the two differ in number.
        DataError: there are no samples.
    """
    guesses = predictions.argmax(-1) if predictions.ndim == 2 else predictions
    if guesses.shape != labels.shape:
        raise ShapeError(f"{len(guesses)} predictions but {len(labels)} labels: give one for each sample")
    if not len(labels):
        raise DataError("accuracy over 0 samples: give at least one")
    return 100 * float((guesses == labels).double().mean())


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share, percent.

    Args:
        correct: right answers, 0 .. total.
        total: all answers, >= 1.
        confidence: in (0, 1).

    Raises:
        DataError: the counts are not such.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    if not 0 <= correct <= total or total < 1:
        raise DataError(f"{correct} right of {total}: give 0 <= correct <= total and at least one sample")
    found = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def average_interval(
    correct: Sequence[int], totals: Sequence[int], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the unweighted mean of the accuracies of several test sets, percent.

    The Wilson intervals of the parts are combined by their squared half-widths (MOVER). It tells the noise of
    finite test sets, not of seeds.

    Args:
        correct: right answers by test set.
        totals: samples by test set.
        confidence: in (0, 1).

    Raises:
        DataError: the counts are not such, or there are none.

    Source: Zou and Donner 2008, Statistics in Medicine 27, for the combination.
    """
    if not len(correct) or len(correct) != len(totals):
        raise DataError(f"{len(correct)} counts of right answers for {len(totals)} test sets: give one each")
    share = 100 * np.asarray(correct) / np.asarray(totals)
    low, high = np.array([wilson(c, n, confidence) for c, n in zip(correct, totals, strict=True)]).T
    mean, parts = share.mean(), len(share)
    below = np.sqrt(((share - low) ** 2).sum()) / parts
    above = np.sqrt(((high - share) ** 2).sum()) / parts
    return float(mean - below), float(mean + above)


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Counts [classes][classes]: row = true class, column = predicted class.

    Args:
        predictions: class ids [N].
        labels: class ids [N].
        classes: how many classes there are; both must lie below.

    Raises:
        DataError: a class id outside 0 .. classes - 1.
    """
    for name, ids in (("prediction", predictions), ("label", labels)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < classes:
            raise DataError(f"a {name} lies outside 0..{classes - 1}: give ids of the {classes} classes")
    if not len(labels):
        return [[0] * classes for _ in range(classes)]
    counts = confusion_matrix(labels.cpu(), predictions.cpu(), labels=range(classes))
    return [[int(n) for n in row] for row in counts]
