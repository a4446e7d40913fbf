from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import chance

seeds = st.integers(-(2**62), 2**62)


@given(seed=seeds, purpose=st.integers(0, 200), first=st.integers(0, 10**9), view=st.integers(0, 10**6))
def test_a_draw_depends_on_its_own_keys_alone(seed: int, purpose: int, first: int, view: int) -> None:
    index = first + np.arange(7)
    together = chance.uniform(seed, purpose, index, np.full(7, view))
    alone = [chance.uniform(seed, purpose, place, view)[0] for place in index]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_splitmix64_reference_value() -> None:
    # The published generator seeded with 0 gives 0xE220A8397B1DCDAF first.
    assert int(chance.bits(0)[0]) == 0xE220A8397B1DCDAF


def test_uniform_is_uniform_and_keys_are_independent() -> None:
    draws = chance.uniform(3, np.arange(4)[:, None], np.arange(20_000)[None, :])
    counts = np.stack([np.histogram(row, bins=16, range=(0, 1))[0] for row in draws])
    assert np.abs(counts - 1250).max() < 200
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 0.03


def test_normal_has_mean_0_and_deviation_1() -> None:
    draws = chance.normal(5, np.arange(50_000))
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02
    assert np.abs(draws).max() <= 2 * 3**0.5


@given(count=st.integers(1, 300), seed=seeds)
def test_order_is_a_permutation_that_can_be_drawn_again(count: int, seed: int) -> None:
    order = chance.order(count, seed, 4)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == chance.order(count, seed, 4).tolist()


def test_orders_of_two_epochs_differ() -> None:
    assert chance.order(100, 0, 0).tolist() != chance.order(100, 0, 1).tolist()
