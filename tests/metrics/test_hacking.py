"""What must be true of the measures of teacher hacking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError, ShapeError
from limbeck.metrics.hacking import chain_kl, distances, hacking_report, power_law, sequence_distance

seeds = st.integers(0, 2**31)
kinds = st.sampled_from(["forward_kl", "reverse_kl", "jeffreys"])


def logits(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 5, 6)), generator=generator, dtype=torch.float64)


@given(seeds, kinds)
def test_distance_of_equals_and_of_the_same_reference(seed: int, kind: str) -> None:
    oracle, teacher = logits(seed), logits(seed + 1)
    mask = torch.ones(3, 5)
    assert sequence_distance(teacher, teacher + 2, mask, kind).item() == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]
    assert sequence_distance(oracle, teacher, mask, kind) > 0  # type: ignore[arg-type]


@given(seeds)
def test_jeffreys_is_the_sum_of_both_directions(seed: int) -> None:
    one, other = logits(seed), logits(seed + 1)
    both = distances(one, other, "forward_kl") + distances(one, other, "reverse_kl")
    torch.testing.assert_close(distances(one, other, "jeffreys"), both)
    torch.testing.assert_close(distances(other, one, "jeffreys"), both)
    torch.testing.assert_close(distances(one, other, "reverse_kl"), distances(other, one, "forward_kl"))


@given(seeds, kinds)
def test_what_does_not_count_is_nothing(seed: int, kind: str) -> None:
    reference, student = logits(seed), logits(seed + 1).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [0] * 5])  # the last answer is empty
    each = distances(reference, student, kind)  # type: ignore[arg-type]
    wanted = (each[0, :2].sum() + each[1].sum()) / 3
    with torch.no_grad():
        reference[mask == 0], student[mask == 0] = torch.nan, torch.nan
    found = sequence_distance(reference, student, mask, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted)
    assert torch.isfinite(torch.autograd.grad(found, student)[0]).all()
    with torch.no_grad():
        reference[..., 0], student[..., 0] = -torch.inf, -torch.inf  # a token that neither allows
    assert torch.isfinite(sequence_distance(reference, student, mask, kind))  # type: ignore[arg-type]


def chain(seed: int, size: int) -> tuple[Tensor, Tensor]:
    return logits(seed, size).softmax(-1), logits(seed + 1, size, size).softmax(-1)


def test_sampled_distance_comes_to_the_exact_one() -> None:
    size, length, count = 4, 6, 20_000
    p_start, p_next = chain(0, size)
    q_start, q_next = chain(10, size)
    generator = torch.Generator().manual_seed(0)
    tokens = [p_start.multinomial(count, replacement=True, generator=generator)]
    while len(tokens) < length:
        tokens.append(p_next[tokens[-1]].multinomial(1, generator=generator)[:, 0])
    before = torch.stack(tokens[:-1], dim=1)
    own = torch.cat([p_start.expand(count, 1, size), p_next[before]], dim=1).log()
    other = torch.cat([q_start.expand(count, 1, size), q_next[before]], dim=1).log()
    exact = chain_kl(p_start, p_next, q_start, q_next, length)
    mask = torch.ones(count, length)
    for n, error in ((200, 0.2), (count, 0.02)):
        sampled = sequence_distance(own[:n], other[:n], mask[:n]).item()
        assert sampled == pytest.approx(exact, rel=error)


@given(seeds, st.integers(1, 8))
def test_chain_kl(seed: int, length: int) -> None:
    start, step = chain(seed, 3)
    other_start, other_step = chain(seed + 5, 3)
    assert chain_kl(start, step, start, step, length) == 0
    found = chain_kl(start, step, other_start, other_step, length)
    assert found >= chain_kl(start, step, other_start, other_step, max(1, length - 1)) - 1e-12
    even = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    alike = chain_kl(even[0], step[:1].expand(3, 3), even[0], other_step[:1].expand(3, 3), length)
    row = float((step[0] * (step[0] / other_step[0]).log()).sum())
    assert alike == pytest.approx((length - 1) * row)


def test_chain_kl_where_tokens_never_stand() -> None:
    start, step = np.array([1.0, 0]), np.array([[1.0, 0], [0.5, 0.5]])
    other = np.array([[0.5, 0.5], [1, 0]])  # infinitely far behind a token that never stands
    assert chain_kl(start, step, np.array([1.0, 0]), other, 3) == pytest.approx(2 * math.log(2))
    assert chain_kl(start, step, np.array([0.0, 1]), other, 1) == math.inf


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_a_falling_golden_is_not_hacked(values: list[float]) -> None:
    falling = sorted(values, reverse=True)
    assert not hacking_report(falling, falling, 0.0).hacked
    assert not hacking_report([1.0] * len(values), [2.0] * len(values), 0.0).hacked


def test_a_u_is_hacked_and_time_does_not_matter() -> None:
    proxy, golden = [5.0, 4, 3, 2, 1], [9.0, 8, 7, 7.5, 8.5]
    found = hacking_report(proxy, golden, 0.5)
    assert (found.argmin, found.rise, found.hacked) == (2, 1.5, True)
    slow = hacking_report(*(np.repeat(x, 3).tolist() for x in (proxy, golden)), 0.5)
    assert (slow.rise, slow.hacked) == (1.5, True)
    assert not hacking_report(proxy, golden, 1.5).hacked
    assert not hacking_report([5.0, 4, 3, 3.5, 4], golden, 0.5).hacked  # the proxy went up as well


@given(st.floats(0.01, 100), st.floats(-2, 2))
def test_an_exact_power_law(factor: float, exponent: float) -> None:
    steps = [1, 2, 5, 10, 50, 100]
    found = power_law(steps, [factor * k**-exponent for k in steps])
    assert found.slope == pytest.approx(-exponent, abs=1e-9)
    assert found.intercept == pytest.approx(math.log(factor), abs=1e-9)
    assert found.max_residual == pytest.approx(0, abs=1e-9)
    if abs(exponent) > 1e-3:
        assert found.r2 == pytest.approx(1)


def test_a_departure_from_the_line_shows() -> None:
    steps = list(range(1, 21))
    straight = [k**-0.5 for k in steps]
    bent = [*straight[:-3], *(2 * v for v in straight[-3:])]
    assert power_law(steps, bent).max_residual > 0.3
    flat = power_law(steps, [1.0] * 20)
    assert (flat.slope, flat.intercept, flat.r2, flat.max_residual) == (0, 0, 1, 0)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="kind 'kl'"):
        distances(logits(0), logits(1), "kl")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 texts"):
        sequence_distance(logits(0)[:0], logits(1)[:0], torch.ones(0, 5))
    with pytest.raises(ShapeError, match="per evaluation"):
        hacking_report([1.0], [1.0, 2], 0)
    with pytest.raises(NonFiniteError, match="not finite"):
        hacking_report([1.0], [math.nan], 0)
    with pytest.raises(ConfigError, match="tolerance is -1"):
        hacking_report([1.0], [1.0], -1)
    with pytest.raises(DataError, match="above 0"):
        power_law([1, 2], [1.0, -1])
    with pytest.raises(DataError, match="two steps that differ"):
        power_law([2, 2], [1.0, 1])
    with pytest.raises(ShapeError, match="one value per step"):
        power_law([1, 2], [1.0])
    with pytest.raises(ShapeError, match="chains have shapes"):
        chain_kl(np.ones(2), np.ones((2, 2)), np.ones(3), np.ones((2, 2)), 2)
    with pytest.raises(ConfigError, match="length is 0"):
        chain_kl(np.ones(1), np.ones((1, 1)), np.ones(1), np.ones((1, 1)), 0)
