"""Why a teacher that saw more data helps: ridge regression on pruned data, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from limbeck.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class RidgeTheory:
    """The expected error of the student's weights, as a parabola in alpha.

    Attributes:
        bias2: squared bias [A] at each alpha.
        variance: what the noise of the labels adds [A].
        error: their sum [A]: E‖theta_s - theta*‖².
        alpha_star: where the parabola is lowest, not clipped to [0, 1]; 0 where alpha has no effect.
        error_star: the error there.
        error_teacher: the teacher's own error.
    """

    bias2: Array
    variance: Array
    error: Array
    alpha_star: float
    error_star: float
    error_teacher: float


def ridge_theory(
    columns: Array, kept: npt.NDArray[np.int64], theta: Array, alphas: Sequence[float] | Array,
    ridge: float, gamma2: float,
) -> RidgeTheory:  # fmt: skip
    """The student's error when it learns from kept samples with targets (1 - alpha) y + alpha X_sᵀ theta_t.

    Both estimators are linear in the labels y = Xᵀ theta* + noise: theta_s = (M0 + alpha · M1) y.

    Args:
        columns: X_t [d, N_t], the samples that the teacher sees.
        kept: positions [n] among them of those that the student sees.
        theta: the true weights theta* [d].
        alphas: weights of the teacher's part [A].
        ridge: lambda > 0 of both fits.
        gamma2: variance of the labels' noise, >= 0.

    Raises:
        ConfigError: a wrong ``ridge`` or ``gamma2``.
        DataError: nothing is kept.

    Source: the linear model of Ben-Baruch et al., ICML 2025 (arXiv 2403.07854), re-derived.
    """
    if not ridge > 0 or not gamma2 >= 0:
        raise ConfigError(f"ridge is {ridge} and gamma2 {gamma2}: allowed are ridge > 0 and gamma2 >= 0")
    if not len(kept):
        raise DataError("no sample is kept: keep at least one")
    ours = columns[:, kept]
    teacher = _solve(columns, columns, ridge)
    m0 = np.zeros_like(teacher)
    m0[:, kept] = _solve(ours, ours, ridge)
    m1 = _solve(ours, ours @ ours.T @ teacher, ridge) - m0
    clean = columns.T @ theta
    b0, b1 = m0 @ clean - theta, m1 @ clean

    def parts(alpha: float) -> tuple[float, float]:
        return float(np.sum((b0 + alpha * b1) ** 2)), gamma2 * float(np.sum((m0 + alpha * m1) ** 2))

    curve = float(b1 @ b1 + gamma2 * np.sum(m1 * m1))
    star = -float(b0 @ b1 + gamma2 * np.sum(m0 * m1)) / curve if curve > 0 else 0.0
    bias2, variance = np.array([parts(float(a)) for a in alphas]).reshape(-1, 2).T
    own = float(np.sum((teacher @ clean - theta) ** 2) + gamma2 * np.sum(teacher**2))
    return RidgeTheory(bias2, variance, bias2 + variance, star, sum(parts(star)), own)


def ridge_table(
    fractions: Sequence[float] = FRACTIONS, alphas: Sequence[float] = (0.0, 0.5, 1.0), *, dimension: int = 20,
    samples: int = 200, ridge: float = 1.0, gamma2: float = 1.0, draws: int = 50, seed: int = 0,
) -> dict[float, dict[str, float]]:  # fmt: skip
    """The error by fraction kept, a mean over random samples and random true weights of norm 1.

    Args:
        fractions: shares that the student keeps; the teacher sees all samples.
        alphas: weights of the teacher's part.
        dimension: d.
        samples: N_t.
        ridge: lambda > 0.
        gamma2: variance of the labels' noise.
        draws: problems to average over.
        seed: of the draws.

    Returns:
        By fraction: the error at each alpha (by its text), ``alpha_star`` and ``error_star``.
    """
    table = {}
    for fraction in fractions:
        count = max(1, int(fraction * samples + 0.5))
        rows = []
        for draw in range(draws):
            chance = np.random.default_rng([seed, draw])  # the same problems for every fraction
            columns = chance.standard_normal((dimension, samples))
            theta = chance.standard_normal(dimension)
            found = ridge_theory(
                columns, np.arange(count), theta / np.linalg.norm(theta), alphas, ridge, gamma2
            )
            rows.append([*found.error, found.alpha_star, found.error_star])
        names = [*(f"{alpha:g}" for alpha in alphas), "alpha_star", "error_star"]
        table[fraction] = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    return table


def _solve(columns: Array, right: Array, ridge: float) -> Array:
    """(X Xᵀ + ridge · I)⁻¹ right."""
    factor = cho_factor(columns @ columns.T + ridge * np.eye(len(columns)))
    found: Array = cho_solve(factor, right)
    return found
