"""What must be true of TAID's moving target and of the rule that moves it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    TAID,
    ForwardKL,
    TAIDState,
    centred,
    intermediate,
    pair_of,
    taid_update,
    token_divergence,
)

seeds = st.integers(0, 2**31)
shares = st.floats(0, 1)


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int) -> tuple[Tensor, Tensor]:
    return draw(seed, 4, 7).requires_grad_(), draw(seed + 1, 4, 7)


def grad(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def run(values: list[float], **settings: float) -> list[TAIDState]:
    states = [TAIDState.begin(0.4)]
    for step, value in enumerate(values):
        states.append(taid_update(states[-1], torch.tensor(value), step, len(values), **settings))
    return states[1:]


@given(seeds)
def test_the_ends_of_the_way(seed: int) -> None:
    student, teacher = pair(seed)
    there = token_divergence(TAID(1.0), student, teacher)
    plain = token_divergence(ForwardKL(cross_entropy=True), student, teacher)
    torch.testing.assert_close(there, plain)
    torch.testing.assert_close(grad(there, student), grad(plain, student))
    here = token_divergence(TAID(0.0), student, teacher)
    q = student.softmax(-1)
    torch.testing.assert_close(here, -(q * q.log()).sum(-1).mean())
    assert grad(here, student).abs().max() < 1e-12


@given(seeds, shares)
def test_no_gradient_goes_through_the_target(seed: int, t: float) -> None:
    student, teacher = pair(seed)
    target = intermediate(student, teacher, t)
    torch.testing.assert_close(target, ((1 - t) * student + t * teacher).softmax(-1).detach())
    closed = (student.softmax(-1) - target).detach()
    for divergence in (TAID(t), TAID(torch.tensor(t)), TAID(t, cross_entropy=False)):
        slope = grad(token_divergence(divergence, student, teacher), student)
        torch.testing.assert_close(slope, closed / 4, rtol=1e-6, atol=1e-7)
        found = pair_of(student.detach(), teacher)
        torch.testing.assert_close(centred(divergence.slope(found), found.q), closed, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_that_of_finite_differences_with_a_fixed_target_alone() -> None:
    student, teacher = pair(0)
    slope = grad(token_divergence(TAID(0.5), student, teacher), student)
    step = torch.zeros_like(teacher)
    step[1, 2] = 1e-6
    target = intermediate(student, teacher, 0.5)

    def fixed(z: Tensor) -> Tensor:
        return -(target * z.log_softmax(-1)).sum(-1).mean()

    ends = [student.detach() + step, student.detach() - step]
    still = (fixed(ends[0]) - fixed(ends[1])) / 2e-6
    moving = token_divergence(TAID(0.5), ends[0], teacher) - token_divergence(TAID(0.5), ends[1], teacher)
    assert still.item() == pytest.approx(slope[1, 2].item(), rel=1e-6)
    assert moving.item() / 2e-6 != pytest.approx(slope[1, 2].item(), rel=1e-2)


def test_the_kl_form_leaves_the_targets_entropy_out() -> None:
    student, teacher = pair(0)
    p = intermediate(student, teacher, 0.3)
    ce, kl = (token_divergence(TAID(0.3, cross_entropy=c), student, teacher) for c in (True, False))
    torch.testing.assert_close(ce - kl, -(p * p.log()).sum(-1).mean())
    assert token_divergence(TAID(0.0, cross_entropy=False), student, teacher).abs() < 1e-12


def test_constants_masks_and_infinite_logits() -> None:
    student, teacher = pair(0)
    mask = torch.tensor([True, False, True, False])
    plain = token_divergence(TAID(0.4), student, teacher, mask=mask)
    moved = token_divergence(TAID(0.4), student + draw(3, 4, 1), teacher + draw(4, 4, 1), mask=mask)
    torch.testing.assert_close(moved, plain)
    own, other = student.detach().clone(), teacher.clone()
    own[1], other[3] = torch.nan, torch.nan
    own.requires_grad_()
    again = token_divergence(TAID(0.4), own, other, mask=mask)
    assert again == plain
    assert torch.equal(grad(again, own), grad(plain, student))
    banned = torch.cat([student, torch.full((4, 1), -torch.inf)], dim=1)
    wider = torch.cat([teacher, draw(5, 4, 1)], dim=1)
    loss = token_divergence(TAID(0.4), banned, wider, mask=mask)
    torch.testing.assert_close(loss, plain)
    assert torch.isfinite(grad(loss, student)).all()
    assert torch.isfinite(intermediate(banned, wider, 1.0)).all()
    assert token_divergence(TAID(0.4), student, teacher, mask=mask & False) == 0


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=40), st.sampled_from([5e-4, 5e-2, 0.9]))
def test_t_never_falls_and_stays_between_the_line_and_the_end(values: list[float], alpha: float) -> None:
    before, steps = 0.4, len(values)
    for step, state in enumerate(run(values, alpha=alpha)):
        t = state.t.item()
        assert before <= t <= 1
        assert t >= 0.4 + 0.6 * step / steps - 1e-6
        before = t
    last = taid_update(state, torch.tensor(1.0), steps, steps, alpha=alpha)
    assert last.t == 1


def test_the_first_loss_is_only_remembered_and_a_constant_one_has_no_momentum() -> None:
    first, second, *_ = run([2.0] * 10, alpha=0.5)
    assert (first.t, first.momentum, first.previous) == (torch.tensor(0.4), 0, 2)
    assert second.momentum == 0
    assert second.step.item() == pytest.approx(0.5 * 0.6 / 2)
    assert second.t.item() == pytest.approx(0.4 + 0.15)


def test_a_rising_loss_slows_down_and_a_falling_one_hastens() -> None:
    rising, falling = (run(v, alpha=0.05, beta=0.5) for v in ([1.0, 1.5, 2.0], [2.0, 1.0, 0.5]))
    assert rising[-1].momentum < 0 < falling[-1].momentum
    assert 0 < rising[1].step < falling[1].step
    assert falling[1].momentum.item() == pytest.approx(0.25)
    assert falling[1].step.item() == pytest.approx(0.05 * 0.6 / (1 + math.exp(-0.25)))


def test_without_adaptation_t_is_the_line_bit_for_bit() -> None:
    for step, state in enumerate(run([1.0 / (i + 1) for i in range(30)], adaptive=False, alpha=0.9)):
        assert state.t == torch.tensor(0.4 + (1.0 - 0.4) * step / 30)


def test_a_resumed_run_is_the_run() -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 1
    state, kept = TAIDState.begin(0.2), None
    for step, value in enumerate(values):
        if step == 11:
            kept = [x.clone() for x in state]
        state = taid_update(state, value, step, 20, t_start=0.2, alpha=0.1)
    assert kept is not None
    again = TAIDState(*kept)
    for step in range(11, 20):
        again = taid_update(again, values[step], step, 20, t_start=0.2, alpha=0.1)
    assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_loss_is_refused_and_counted(bad: float) -> None:
    good = run([2.0, 1.5])[-1]
    after = taid_update(good, torch.tensor(bad), 2, 10)
    assert after.refused == 1
    assert all(torch.equal(a, b) for a, b in zip(after[:4], good[:4], strict=True))
    assert taid_update(after, torch.tensor(1.0), 3, 10).t > good.t
    first = taid_update(TAIDState.begin(), torch.tensor(bad), 0, 10)
    assert first.previous.isinf()


def test_a_step_without_a_token_that_counts_changes_nothing() -> None:
    good = run([2.0, 1.5])[-1]
    after = taid_update(good, torch.tensor(0.0), 2, 10, counted=torch.tensor(0))
    assert all(torch.equal(a, b) for a, b in zip(after, good, strict=True))
