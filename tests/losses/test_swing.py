"""What must be true of the loss that keeps private tokens back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import kl_divergence, swing_loss
from limbeck.losses.swing import gaussian_noise, laplace_noise, soft_target, token_temperature

seeds = st.integers(0, 2**31)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, *(shape or (2, 5, 7)), generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@given(seeds, st.floats(0.5, 4), st.sampled_from([0.0, 1.0]))
def test_one_score_for_all_is_plain_distillation(seed: int, t_low: float, score: float) -> None:
    student, teacher = pair(seed)
    loss = swing_loss(student, teacher, torch.full((2, 5), score), t_low=t_low, t_high=10)
    temperature = t_low if score == 0 else 10.0
    plain = kl_divergence(student, teacher, temperature) / temperature**2
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, plain)))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0.5, 3), st.floats(3, 50))
def test_temperature_rises_with_the_score(scores: list[float], low: float, high: float) -> None:
    score = torch.tensor([0.0, *sorted(scores), 1.0], dtype=torch.float64)
    found = token_temperature(score, low, high)
    assert found.shape == score.shape
    assert (found.diff() >= 0).all()
    assert found[0].item() == pytest.approx(low)
    assert found[-1].item() == pytest.approx(high)


def gradient_at(t_high: float, side: str) -> Tensor:
    student, teacher = pair(5, 1, 1, 7)
    loss = swing_loss(student, teacher, torch.ones(1, 1), t_high=t_high, student_side=side)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, student)
    return grad


def test_a_hot_private_token_teaches_nothing() -> None:
    one, ten = (gradient_at(t, "same").norm().item() for t in (1e3, 1e4))
    assert one / ten == pytest.approx(100, rel=0.01)  # falls as 1 / T²
    student, teacher = pair(5, 1, 1, 7)
    hot = soft_target(teacher, torch.full((1, 1), 1e7))
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 7), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient_at(1e9, "target_only"), (student.softmax(-1) - 1 / 7).detach(), rtol=1e-5, atol=1e-7
    )


@given(seeds, st.floats(0, 3))
def test_any_noise_leaves_a_distribution(seed: int, sigma: float) -> None:
    _, teacher = pair(seed)
    noise = gaussian_noise(teacher, sigma, torch.Generator().manual_seed(seed))
    target = soft_target(teacher, torch.ones(2, 5), noise)
    assert (target > 0).all()
    assert torch.isfinite(target.log()).all()
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    worst = soft_target(teacher, torch.ones(2, 5), torch.full_like(teacher, -5.0))
    torch.testing.assert_close(worst, torch.full_like(worst, 1 / 7))


def test_noise_is_fresh_seeded_and_of_its_scale() -> None:
    like = torch.zeros(200, 100, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    first, second = laplace_noise(like, 0.5, generator), laplace_noise(like, 0.5, generator)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(first, laplace_noise(like, 0.5, torch.Generator().manual_seed(1)))
    assert first.abs().mean().item() == pytest.approx(4, rel=0.03)  # the scale 2 / epsilon
    assert first.mean().item() == pytest.approx(0, abs=0.1)
    assert gaussian_noise(like, 0.3, generator).std().item() == pytest.approx(0.3, rel=0.03)
    assert (gaussian_noise(like, 0.0, generator) == 0).all()


def test_masked_tokens_have_no_influence() -> None:
    student, teacher = pair(3)
    score = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    wanted = swing_loss(student[mask], teacher[mask], score[mask])
    (grad,) = torch.autograd.grad(wanted, student)
    with torch.no_grad():
        student[~mask], teacher[~mask], score[~mask] = torch.nan, torch.nan, torch.nan
    loss = swing_loss(student, teacher, score, mask=mask)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], grad)
    assert swing_loss(student, teacher, score, mask=torch.zeros(2, 5)) == 0


def test_a_broken_teacher_is_not_passed_over() -> None:
    student, teacher = pair(0)
    teacher[1, 2, 0] = torch.nan
    noise = torch.zeros_like(teacher)
    assert torch.isnan(swing_loss(student, teacher, torch.zeros(2, 5)))
    assert torch.isnan(swing_loss(student, teacher, torch.zeros(2, 5), noise=noise))


def test_a_token_that_neither_allows() -> None:
    student, teacher = pair(0)
    with torch.no_grad():
        student[..., 0], teacher[..., 0] = -torch.inf, -torch.inf
    loss = swing_loss(student, teacher, torch.zeros(2, 5))
    torch.testing.assert_close(loss, swing_loss(student[..., 1:], teacher[..., 1:], torch.zeros(2, 5)))
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_wrong_arguments_are_named() -> None:
    student, teacher = pair(0)
    score = torch.zeros(2, 5)
    with pytest.raises(ConfigError, match=r"t_low is 2\.0 and t_high 1\.0"):
        swing_loss(student, teacher, score, t_low=2.0, t_high=1.0)
    with pytest.raises(ConfigError, match="student_side 'both'"):
        swing_loss(student, teacher, score, student_side="both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="logits"):
        swing_loss(student, teacher[..., :4], score)
    with pytest.raises(ConfigError, match="epsilon is 0"):
        laplace_noise(teacher, 0.0, torch.Generator())
