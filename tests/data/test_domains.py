"""What must be true of the samples that a mixture of domains gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.data.domains import DomainSampler, cyclic_indices
from limbeck.errors import CheckpointError, ConfigError, DataError

seeds = st.integers(0, 2**31)


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 60))
def test_each_domain_goes_round(draws: list[int], cut: int) -> None:
    sizes, drawn = (2, 3, 50), np.array(draws, dtype=np.int64)
    found = cyclic_indices(drawn, sizes)
    for domain, size in enumerate(sizes):
        own = found[drawn == domain]
        assert own.tolist() == [i % size for i in range(len(own))]
    used = np.bincount(drawn[:cut], minlength=3).tolist()
    later = cyclic_indices(drawn[cut:], sizes, used)
    assert later.tolist() == found[cut:].tolist()


def test_frequencies_are_the_shares() -> None:
    shares, sampler = (0.5, 0.3, 0.15, 0.05), DomainSampler((100, 7, 1000, 3), seed=0)
    domains, items = sampler.draw(shares, 20_000)
    counts = np.bincount(domains, minlength=4)
    assert stats.chisquare(counts, 20_000 * np.array(shares)).pvalue > 0.01
    for domain, size in enumerate(sampler.sizes):
        seen = np.bincount(items[domains == domain], minlength=size)
        assert seen.max() - seen.min() <= 1  # none starves, none is preferred
    assert sampler.used == counts.tolist()


def test_a_domain_without_a_share_is_never_drawn() -> None:
    domains, _ = DomainSampler((5, 5, 5), seed=3).draw((0.0, 1.0, 0.0), 500)
    assert (domains == 1).all()


@given(seeds)
def test_intervals_differ_and_are_replayable(seed: int) -> None:
    one, other = DomainSampler((9, 4), seed), DomainSampler((9, 4), seed)
    first, second = one.draw((0.5, 0.5), 40), one.draw((0.5, 0.5), 40)
    assert first[0].tolist() != second[0].tolist()
    again = other.draw((0.5, 0.5), 40)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_samples_of_a_domain_are_shuffled() -> None:
    _, items = DomainSampler((1000,), seed=0).draw((1.0,), 1000)
    assert sorted(items.tolist()) == list(range(1000))
    assert items.tolist() != list(range(1000))


def test_the_state_survives_a_checkpoint() -> None:
    shares = ((0.2, 0.8), (0.6, 0.4), (0.5, 0.5))
    whole = DomainSampler((6, 11), seed=5)
    wanted = [whole.draw(share, 17) for share in shares]
    stopped = DomainSampler((6, 11), seed=5)
    stopped.draw(shares[0], 17)
    resumed = DomainSampler((6, 11), seed=5)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    for share, want in zip(shares[1:], wanted[1:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(resumed.draw(share, 17), want, strict=True))
    assert resumed.state() == whole.state()


def test_wrong_arguments_are_named() -> None:
    sampler = DomainSampler((3, 4), seed=0)
    for shares in ((0.5, 0.6), (1.5, -0.5), (1.0,), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="2 numbers from 0 that sum to 1"):
            sampler.draw(shares, 5)
    with pytest.raises(DataError, match=r"\[3, 0\] items"):
        DomainSampler((3, 0), seed=0)
    with pytest.raises(DataError, match="domain 2 is drawn"):
        cyclic_indices(np.array([2]), (3, 4))
    with pytest.raises(CheckpointError, match="seed is 1 but 0"):
        DomainSampler((3, 4), seed=1).restore(sampler.state())
    with pytest.raises(CheckpointError, match="sizes"):
        DomainSampler((3, 5), seed=0).restore(sampler.state())
