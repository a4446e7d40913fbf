"""Statistics against scipy's and against formulas, and what is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.errors import DataError
from limbeck.metrics.statistics import (
    Cell,
    anova,
    holm,
    improvements,
    mean_interval,
    spearman,
    t_above_zero,
)

seeds = st.integers(0, 2**31)
chances = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(seeds, st.integers(3, 30))
def test_tests_are_scipys_with_ties(seed: int, count: int) -> None:
    chance = np.random.default_rng(seed)
    x, y = chance.normal(1, 2, count).round(), chance.normal(size=count).round()
    x[0], y[-1] = 50, 60  # never constant
    found = t_above_zero(x)
    assert found.statistic == pytest.approx(x.mean() / (x.std(ddof=1) / math.sqrt(count)), rel=1e-9)
    assert found.p == pytest.approx(stats.t.sf(found.statistic, count - 1), rel=1e-9)
    rho = spearman(x, y)
    ranks = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert rho.statistic == pytest.approx(ranks, rel=1e-9, abs=1e-9)
    assert rho == pytest.approx(tuple(stats.spearmanr(x, y)), rel=1e-9)


@given(seeds)
def test_anova_by_sums_of_squares(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=12)
    groups = np.array([0, 1, 2] * 4)
    means = np.array([values[groups == g].mean() for g in range(3)])
    between = 4 * ((means - values.mean()) ** 2).sum() / 2
    within = ((values - means[groups]) ** 2).sum() / 9
    found = anova(values, groups)
    assert found.statistic == pytest.approx(between / within, rel=1e-9)
    assert found.p == pytest.approx(stats.f.sf(between / within, 2, 9), rel=1e-9)
    assert anova(values, np.array(["a", "b", "c"])[groups]) == found


def test_what_is_undefined_is_nan_with_a_warning() -> None:
    with pytest.warns(stats.ConstantInputWarning):
        assert math.isnan(spearman([1, 1, 1], [1, 2, 3]).statistic)
    with pytest.warns(RuntimeWarning):
        assert math.isnan(t_above_zero([1.0]).p)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    nothing, adjusted = holm([math.nan, 0.04])
    assert math.isnan(nothing)
    assert adjusted == 0.04


@given(chances)
def test_holm_raises_and_keeps_the_order(p: list[float]) -> None:
    found = holm(p)
    assert all(a >= b and a <= 1 for a, b in zip(found, p, strict=True))
    assert (np.diff(np.array(found)[np.argsort(p, kind="stable")]) >= 0).all()
    assert min(found) == pytest.approx(min(1, len(p) * min(p)))


def test_gains_pair_cells_and_say_what_they_drop() -> None:
    one, two, three = Cell("0.5B", "gsm8k", 0), Cell("0.5B", "gsm8k", 1), Cell("7B", "gsm8k", 0)
    assert improvements({one: 40.0, two: 41.0}, {two: 30.0, one: 35.0}) == {one: 5.0, two: 11.0}
    with pytest.warns(UserWarning, match=r"2 cells .*0\.5B/gsm8k/seed 1, 7B/gsm8k/seed 0"):
        assert improvements({one: 40.0, two: 41.0}, {one: 35.0, three: 50.0}) == {one: 5.0}
    with pytest.warns(UserWarning), pytest.raises(DataError, match="no cell"):
        improvements({one: 1.0}, {two: 1.0})


def test_the_interval_of_a_mean_is_students() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    wanted = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted)
    assert all(math.isnan(end) for end in mean_interval([3.0]))
