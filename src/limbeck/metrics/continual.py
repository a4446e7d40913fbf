"""What an accuracy matrix over tasks says: averages, and forgetting in its three definitions.

A matrix is [N, N], percent: row t holds the accuracies after training task t, column i those of task i.
Entries above the diagonal (tasks not yet seen) are never read and may be anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limbeck.errors import NonFiniteError, ShapeError, unknown

Matrix = NDArray[np.float64]


def average_accuracy(matrix: ArrayLike) -> float:
    """A_N: the mean over tasks of the final accuracies, percent. Each task counts alike.

    Raises:
        ShapeError: not a square matrix.
        NonFiniteError: an entry on or below the diagonal is not finite.
    """
    return float(running_average(matrix)[-1])


def running_average(matrix: ArrayLike) -> Matrix:
    """A_t after each task t [N], percent: the mean over the tasks seen. Errors as ``average_accuracy``."""
    seen = _seen(matrix)
    averages: Matrix = seen.sum(axis=1) / np.arange(1, len(seen) + 1)
    return averages


def incremental_average(matrix: ArrayLike) -> float:
    """The mean over t of A_t, percent. Errors as ``average_accuracy``."""
    return float(running_average(matrix).mean())


def just_learned(matrix: ArrayLike) -> float:
    """The mean accuracy of each task right after learning it, percent: plasticity. Errors as above."""
    return float(np.diagonal(_seen(matrix)).mean())


def forgetting(matrix: ArrayLike, definition: str) -> float:
    """Forgetting in percent points by one of the definitions of ``DEFINITIONS``.

    Never clipped: below 0 where later tasks helped earlier ones (``cdl``, ``coda``). 0 for a single task.

    Raises:
        ConfigError: an unknown definition.
        ShapeError: not a square matrix.
        NonFiniteError: an entry on or below the diagonal is not finite.
    """
    if definition not in FORGETTING:
        raise unknown("definition of forgetting", definition, FORGETTING)
    seen = _seen(matrix)
    return float(FORGETTING[definition](seen)) if len(seen) > 1 else 0.0


def _cdl(seen: Matrix) -> Any:
    return (np.diagonal(seen) - seen[-1]).mean()


def _coda(seen: Matrix) -> Any:
    drops = [(seen[t - 1, :t] - seen[t, :t]).mean() for t in range(1, len(seen))]
    return np.mean(drops)


def _l2p(seen: Matrix) -> Any:
    earlier = range(len(seen) - 1)
    return np.mean([seen[i:, i].max() - seen[-1, i] for i in earlier])


FORGETTING: dict[str, Callable[[Matrix], Any]] = {"cdl": _cdl, "coda": _coda, "l2p": _l2p}

DEFINITIONS = {
    "cdl": "mean over all N tasks of (accuracy right after learning - final accuracy); the last counts as 0",
    "coda": "mean over tasks t >= 2 of the mean drop of all earlier tasks in that one step",
    "l2p": "mean over the first N - 1 tasks of (best accuracy ever - final accuracy)",
}


def _seen(matrix: ArrayLike) -> Matrix:
    """The matrix in float64 with zeros above the diagonal, checked."""
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ShapeError(
            f"the accuracy matrix is {list(values.shape)} but must be [N, N] with N >= 1: one row and "
            "one column per task"
        )
    row, column = np.tril_indices(len(values))
    bad = ~np.isfinite(values[row, column])
    if bad.any():
        raise NonFiniteError(
            f"the accuracy of task {column[bad][0]} after task {row[bad][0]} is not finite: evaluate every "
            "task seen so far"
        )
    return np.tril(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))
