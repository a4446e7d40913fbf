"""What must be true of the shares of the domains."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError, ShapeError
from limbeck.metrics.domains import domain_perplexity, initial_factor, update_factor

perplexities = st.lists(st.floats(1, 1e6), min_size=1, max_size=8)
alphas = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shares(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64).softmax(0)


@given(perplexities, alphas, seeds)
def test_shares_sum_to_one_within_their_bounds(student: list[float], alpha: float, seed: int) -> None:
    n = len(student)
    teacher = 1 + 9 * shares(seed, n)
    for found in (
        initial_factor(tensor(student), teacher),
        update_factor(shares(seed, n), tensor(student), teacher, alpha),
    ):
        assert found.sum().item() == pytest.approx(1)
    floor = (1 - alpha) / n
    assert (found >= floor - 1e-12).all()
    assert (found <= alpha + floor + 1e-12).all()
    if n == 1:
        assert found.item() == pytest.approx(1)


@given(seeds, st.integers(1, 8), alphas, st.floats(0.1, 100))
def test_equal_ratios_contract_to_even_shares(seed: int, n: int, alpha: float, ratio: float) -> None:
    share, teacher = shares(seed, n), 2 + 9 * shares(seed + 1, n)
    found = update_factor(share, ratio * teacher, teacher, alpha)
    torch.testing.assert_close(found, alpha * share + (1 - alpha) / n)
    torch.testing.assert_close(found - 1 / n, alpha * (share - 1 / n), rtol=1e-6, atol=1e-12)
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    torch.testing.assert_close(update_factor(even, ratio * teacher, teacher, alpha), even)
    torch.testing.assert_close(initial_factor(teacher, teacher), even)


@given(seeds, st.integers(2, 8), alphas)
def test_domains_are_treated_alike(seed: int, n: int, alpha: float) -> None:
    share, student, teacher = shares(seed, n), 9 * shares(seed + 1, n) + 1, 3 * shares(seed + 2, n) + 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found = update_factor(share, student, teacher, alpha)
    torch.testing.assert_close(
        update_factor(share[order], student[order], teacher[order], alpha), found[order]
    )
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    by_ratio = update_factor(even, student, teacher, alpha)[(student / teacher).argsort()]
    assert (by_ratio.diff() >= -1e-12).all()


@given(seeds, st.integers(2, 8), st.floats(-5, 5))
def test_a_constant_on_all_ratios_changes_nothing(seed: int, n: int, constant: float) -> None:
    share, ratio, teacher = shares(seed, n), 6 + 9 * shares(seed + 1, n), 1 + shares(seed + 2, n)
    one, other = (update_factor(share, r * teacher, teacher, 0.5) for r in (ratio, ratio + constant))
    torch.testing.assert_close(one, other)


def test_the_ends_of_alpha() -> None:
    share, student, teacher = shares(0, 4), tensor([12, 9, 30, 7.5]), tensor([8, 8.5, 11, 7])
    even = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(update_factor(share, student, teacher, 0.0), even)
    torch.testing.assert_close(update_factor(even, student, teacher, 1.0), initial_factor(student, teacher))


def test_huge_ratios_do_not_overflow() -> None:
    student, teacher = tensor([1e5, 2, 3e5]), tensor([1, 1, 1])
    assert initial_factor(student, teacher).tolist() == [0, 0, 1]
    found = update_factor(tensor([0.5, 0.5, 0.0]), student, teacher, 0.5)
    torch.testing.assert_close(found, tensor([0.5 + 1 / 6, 1 / 6, 1 / 6]))


def test_perplexity_is_pooled_over_tokens() -> None:
    found = domain_perplexity(tensor([100 * math.log(3), 0]), torch.tensor([100, 7]))
    torch.testing.assert_close(found, tensor([3, 1]))


def test_a_domain_that_cannot_be_measured_is_named() -> None:
    with pytest.raises(DataError, match="domain 1 has no validation tokens"):
        domain_perplexity(tensor([1, 0]), torch.tensor([3, 0]))
    with pytest.raises(NonFiniteError, match="domain 1 is nan"):
        domain_perplexity(tensor([1, math.nan]), torch.tensor([3, 3]))
    with pytest.raises(NonFiniteError, match="domain 0 is inf"):
        update_factor(tensor([0.5, 0.5]), tensor([math.inf, 2]), tensor([1, 1]))
    with pytest.raises(ConfigError, match="alpha is 2"):
        update_factor(tensor([1]), tensor([2]), tensor([1]), 2)
    with pytest.raises(ShapeError, match="one a domain"):
        update_factor(tensor([1]), tensor([2, 2]), tensor([1, 1]))
    with pytest.raises(ShapeError, match="one of each per domain"):
        initial_factor(tensor([1]), tensor([2, 2]))
