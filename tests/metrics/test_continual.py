"""What must be true of the figures over tasks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import ConfigError, NonFiniteError, ShapeError
from limbeck.metrics import continual

NAN = np.nan
MATRIX = [[90.0, NAN, NAN], [80.0, 70.0, NAN], [85.0, 60.0, 50.0]]


def test_figures_of_a_small_matrix() -> None:
    assert continual.average_accuracy(MATRIX) == pytest.approx(65)
    np.testing.assert_allclose(continual.running_average(MATRIX), [90, 75, 65])
    assert continual.incremental_average(MATRIX) == pytest.approx((90 + 75 + 65) / 3)
    assert continual.just_learned(MATRIX) == pytest.approx(70)
    assert continual.forgetting(MATRIX, "cdl") == pytest.approx((5 + 10 + 0) / 3)
    assert continual.forgetting(MATRIX, "coda") == pytest.approx((10 + (-5 + 10) / 2) / 2)
    assert continual.forgetting(MATRIX, "l2p") == pytest.approx((5 + 10) / 2)


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_just_learned_is_average_plus_forgetting(tasks: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(0, 100, (tasks, tasks))
    total = continual.average_accuracy(matrix) + continual.forgetting(matrix, "cdl")
    assert continual.just_learned(matrix) == pytest.approx(total)


@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(sorted(continual.FORGETTING)))
def test_unseen_tasks_are_never_read(tasks: int, seed: int, definition: str) -> None:
    matrix = np.random.default_rng(seed).uniform(0, 100, (tasks, tasks))
    hidden = np.where(np.tri(tasks, dtype=bool), matrix, np.nan)
    assert continual.forgetting(matrix, definition) == continual.forgetting(hidden, definition)
    assert continual.average_accuracy(matrix) == continual.average_accuracy(hidden)


@pytest.mark.parametrize("definition", sorted(continual.FORGETTING))
def test_one_task_forgets_nothing(definition: str) -> None:
    assert continual.forgetting([[55.0]], definition) == 0


@pytest.mark.parametrize("definition", ["cdl", "coda"])
def test_gains_are_not_clipped(definition: str) -> None:
    assert continual.forgetting([[50.0, NAN], [80.0, 70.0]], definition) < 0


def test_every_definition_is_told_in_words() -> None:
    assert continual.DEFINITIONS.keys() == continual.FORGETTING.keys()


def test_wrong_input_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'coda'"):
        continual.forgetting(MATRIX, "codo")
    with pytest.raises(ShapeError, match=r"\[1, 2\]"):
        continual.average_accuracy([[1.0, 2.0]])
    with pytest.raises(ShapeError, match=r"\[0\]"):
        continual.average_accuracy([])
    with pytest.raises(NonFiniteError, match="task 0 after task 1"):
        continual.average_accuracy([[1.0, NAN], [NAN, 2.0]])
