"""What must be true of spaces of architectures and of the search in them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import ConfigError, NonFiniteError
from limbeck.nets.search_space import (
    BASE,
    SMALL,
    TINY,
    Architecture,
    SearchSpace,
    by_cost,
    kept_layers,
    released_parameters,
    sandwich,
    search,
)

SPACE = SearchSpace((1, 2), (16, 24), (2.0, 3.0), (1, 2))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def cost(a: Architecture) -> float:
    return released_parameters(a, most_heads=12, vocabulary=30522)


@pytest.mark.parametrize("space", [TINY, SMALL, BASE])
def test_the_papers_spaces_run_from_the_smallest_to_the_largest(space: SearchSpace) -> None:
    ordered = by_cost(space.architectures(), cost)
    assert len(set(ordered)) == 256
    assert (ordered[0], ordered[-1]) == (space.smallest, space.largest)


def test_the_cost_rises_on_every_axis() -> None:
    base = Architecture(9, 256, 2.5, 7)
    for larger in (
        Architecture(10, 256, 2.5, 7),
        Architecture(9, 288, 2.5, 7),
        Architecture(9, 256, 3.0, 7),
        Architecture(9, 256, 2.5, 8),
    ):
        assert cost(larger) > cost(base)


@given(st.integers(1, 40), st.data())
def test_kept_layers_rise_from_the_first(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    kept = kept_layers(total, count)
    assert kept[0] == 0
    assert len(kept) == count
    assert all(a < b for a, b in pairwise(kept))
    assert kept[-1] < total
    assert kept_layers(total, total) == tuple(range(total))


def test_too_many_layers() -> None:
    with pytest.raises(ConfigError, match="layers is 13 but must be from 1 to the 12"):
        kept_layers(12, 13)


@given(st.integers(0, 2**31), st.integers(0, 20))
def test_every_sandwich_has_both_ends_and_distinct_others(seed: int, others: int) -> None:
    drawn = sandwich(SPACE, others, seeded(seed))
    assert drawn[:2] == (SPACE.largest, SPACE.smallest)
    assert len(set(drawn)) == len(drawn) == 2 + min(others, 14)
    assert drawn == sandwich(SPACE, others, seeded(seed))


def test_sandwiches_differ_from_step_to_step_and_reach_the_whole_space() -> None:
    seen = {a for step in range(60) for a in sandwich(SPACE, 2, seeded(step))}
    assert seen == set(SPACE.architectures())


def test_a_space_of_one_architecture() -> None:
    space = SearchSpace((2,), (16,), (2.0,), (1,))
    assert sandwich(space, 2, seeded(0)) == (Architecture(2, 16, 2.0, 1),)


@pytest.mark.parametrize(
    ("hidden", "ratio", "ffn"), [(160, 3.5, 560), (10, 2.3, 23), (100, 1.1, 110), (7, 2.5, 17)]
)
def test_the_feed_forward_width_is_not_cut_by_rounding_errors(hidden: int, ratio: float, ffn: int) -> None:
    assert Architecture(1, hidden, ratio, 1).ffn == ffn


def test_the_search_takes_the_first_of_the_best_strictly_below_the_limit() -> None:
    losses = [0.1, 0.5, 0.3, 0.3]
    assert search(losses, [9, 1, 2, 3], 9) == 2
    assert search(losses, [9, 1, 2, 3], 9.1) == 0
    assert search([float("nan"), 0.5], [9, 1], 9) == 1
    with pytest.raises(
        ConfigError, match=r"limit is 1 but no architecture costs less \(the cheapest costs 1\)"
    ):
        search(losses, [9, 1, 2, 3], 1)
    with pytest.raises(NonFiniteError, match="architecture 0 is nan"):
        search([float("nan"), 0.5], [1, 1], 9)
    with pytest.raises(ConfigError, match="losses has 4 entries but costs has 1"):
        search(losses, [1], 9)


def test_an_axis_that_does_not_rise() -> None:
    with pytest.raises(ConfigError, match=r"heads is \[2, 1\] but must be rising"):
        SearchSpace((1,), (8,), (2.0,), (2, 1))
    with pytest.raises(ConfigError, match=r"layers is \[\]"):
        SearchSpace((), (8,), (2.0,), (1,))
