"""What a study says of many students: tests and correlations (scipy's), and gains over a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from limbeck.errors import DataError


class Outcome(NamedTuple):
    """The outcome of a statistical test.

    Attributes:
        statistic: t, F or Spearman's rho.
        p: the chance of one as extreme where there is no effect; NaN where it is undefined.
    """

    statistic: float
    p: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of independent values [N] by Student's t; of one value alone NaN.

    Source: Student 1908, Biometrika 6.
    """
    found = np.asarray(values, dtype=np.float64)
    spread = float(found.std(ddof=1)) if len(found) > 1 else float("nan")
    half = float(stats.t.ppf(0.5 + confidence / 2, max(len(found) - 1, 1))) * spread / len(found) ** 0.5
    return float(found.mean()) - half, float(found.mean()) + half


def t_above_zero(values: ArrayLike) -> Outcome:
    """Student's t of the mean against 0, one-sided: is it above?

    One value alone, or none, gives NaN, and a warning of scipy's.

    Source: the study's first hypothesis (arXiv 2505.15442).
    """
    return _test(stats.ttest_1samp(np.asarray(values, dtype=np.float64), 0.0, alternative="greater"))


def anova(values: ArrayLike, groups: ArrayLike) -> Outcome:
    """One-way analysis of variance: do the groups differ in their mean?

    Args:
        values: [N].
        groups: of each value [N].

    Source: the study's comparison of methods (arXiv 2505.15442).
    """
    numbers, of = np.asarray(values, dtype=np.float64), np.asarray(groups)
    return _test(stats.f_oneway(*(numbers[of == group] for group in np.unique(of))))


def spearman(one: ArrayLike, other: ArrayLike) -> Outcome:
    """Spearman's correlation of two lists [N] and its two-sided p; equal values share their mean rank.

    Where one of the two is constant it is undefined: NaN, and a warning of scipy's.

    Source: the study's hypotheses on teacher, size, agreement and fidelity (arXiv 2505.15442).
    """
    return _test(stats.spearmanr(np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for having made all these tests, in 0 .. 1; a NaN stays one and counts as no test.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    worst = 0.0
    for done, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - done) * float(p[i])))
        adjusted[i] = worst
    return [float(x) for x in adjusted]


@dataclass(frozen=True)
class Cell:
    """One student of a study that is compared with its undistilled self.

    Attributes:
        size: of the student, as the study names it.
        task: what it was tested on.
        seed: of its training.
    """

    size: str
    task: str
    seed: int


def improvements(distilled: Mapping[Cell, float], baseline: Mapping[Cell, float]) -> dict[Cell, float]:
    """distilled - baseline of each cell that has both; what has not is dropped with a warning.

    Args:
        distilled: a figure of the students of one method.
        baseline: of the same students trained without a teacher.

    Raises:
        DataError: no cell has both.

    Source: the study's improvement over supervised fine-tuning (arXiv 2505.15442).
    """
    alone = distilled.keys() ^ baseline.keys()
    if alone:
        named = ", ".join(sorted(f"{c.size}/{c.task}/seed {c.seed}" for c in alone))
        warnings.warn(f"{len(alone)} cells without a counterpart are dropped: {named}", stacklevel=2)
    found = {cell: value - baseline[cell] for cell, value in distilled.items() if cell in baseline}
    if not found:
        raise DataError(
            "no cell has both a distilled and a baseline student: give the same sizes, tasks, seeds"
        )
    return found


def _test(found: Any) -> Outcome:
    return Outcome(float(found.statistic), float(found.pvalue))
