"""What must be true of the KL of softened distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import kl_divergence

seeds = st.integers(0, 2**31)
temperatures = st.floats(0.25, 20)


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(seeds, temperatures)
def test_never_negative_and_gradient_rows_sum_to_zero(seed: int, temperature: float) -> None:
    student, teacher = logits(seed, 4, 6).requires_grad_(), logits(seed + 1, 4, 6)
    loss = kl_divergence(student, teacher, temperature)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss >= 0
    torch.testing.assert_close(grad.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@given(seeds, temperatures)
def test_gradient_is_the_closed_form(seed: int, temperature: float) -> None:
    student, teacher = logits(seed, 4, 6).requires_grad_(), logits(seed + 1, 4, 6)
    (grad,) = torch.autograd.grad(kl_divergence(student, teacher, temperature), student)
    gap = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(grad, temperature / 4 * gap.detach(), rtol=1e-9, atol=1e-12)


@given(seeds, temperatures)
def test_zero_with_zero_gradient_up_to_a_constant_per_row(seed: int, temperature: float) -> None:
    teacher = logits(seed, 4, 6)
    student = (teacher + logits(seed + 1, 4, 1)).requires_grad_()
    loss = kl_divergence(student, teacher, temperature)
    (grad,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-12 * temperature**2 + 1e-13
    assert grad.abs().max() < 1e-12 * max(temperature, 1)


@given(seeds)
def test_a_constant_per_row_changes_nothing(seed: int) -> None:
    student, teacher, shift = logits(seed, 4, 6), logits(seed + 1, 4, 6), logits(seed + 2, 4, 1)
    plain = kl_divergence(student, teacher, 2)
    torch.testing.assert_close(kl_divergence(student + shift, teacher, 2), plain)
    torch.testing.assert_close(kl_divergence(student, teacher + shift, 2), plain)


def test_limit_of_infinite_temperature() -> None:
    student, teacher = logits(0, 4, 6), logits(1, 4, 6)
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdim=True)).square().sum(-1).mean() / (2 * 6)
    torch.testing.assert_close(kl_divergence(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


def test_one_class_gives_zero() -> None:
    student = logits(0, 4, 1).requires_grad_()
    loss = kl_divergence(student, logits(1, 4, 1), 2)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    student = torch.tensor([[200.0, -200, 0], [-200, 200, 200]], dtype=dtype, requires_grad=True)
    loss = kl_divergence(student, torch.tensor([[-200.0, 200, 0], [200, -200, -200]], dtype=dtype), 1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_precision_is_float32_or_the_given_float64() -> None:
    assert kl_divergence(torch.zeros(1, 2), torch.ones(1, 2)).dtype == torch.float32
    assert kl_divergence(logits(0, 1, 2), logits(1, 1, 2)).dtype == torch.float64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_teacher_is_seen(bad: float) -> None:
    teacher = logits(0, 4, 6)
    teacher[1, 2] = bad
    assert torch.isnan(kl_divergence(logits(1, 4, 6), teacher))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = logits(0, 4, 6).requires_grad_(), logits(1, 4, 6).requires_grad_()
    kl_divergence(student, teacher).backward()
    assert teacher.grad is None


def test_mask_drops_and_weights_scale() -> None:
    student, teacher = logits(0, 4, 3, 6), logits(1, 4, 3, 6)
    items = kl_divergence(student, teacher, reduction="none")
    mask = torch.tensor([[True, True, False]] * 3 + [[False] * 3])
    weights = torch.tensor([1.0, 2, 0, 1])
    torch.testing.assert_close(kl_divergence(student, teacher, mask=mask), items[mask].mean())
    torch.testing.assert_close(kl_divergence(student, teacher, mask=mask, reduction="sum"), items[mask].sum())
    weighted = (items * weights[:, None].double()).mean()
    torch.testing.assert_close(kl_divergence(student, teacher, weights=weights), weighted)
    assert kl_divergence(student, teacher, mask=torch.zeros(4, dtype=torch.bool)) == 0


@given(seeds, temperatures)
def test_the_mean_in_one_step_is_the_mean_of_the_items(seed: int, temperature: float) -> None:
    student, teacher = logits(seed, 4, 3, 6).requires_grad_(), logits(seed + 1, 4, 3, 6)
    short = kl_divergence(student, teacher, temperature)
    plain = kl_divergence(student, teacher, temperature, mask=torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(short, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (short, plain)))


def test_what_is_masked_out_may_be_broken() -> None:
    student, teacher = logits(0, 2, 6).requires_grad_(), logits(1, 2, 6)
    teacher[1] = torch.nan
    loss = kl_divergence(student, teacher, mask=torch.tensor([True, False]))
    assert torch.isfinite(loss)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\[4, 6\].*\[4, 5\]"):
        kl_divergence(logits(0, 4, 6), logits(0, 4, 5))
    with pytest.raises(ShapeError, match="weights"):
        kl_divergence(logits(0, 4, 6), logits(0, 4, 6), weights=torch.ones(3))
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        kl_divergence(logits(0, 4, 6), logits(0, 4, 6), reduction="meen")  # type: ignore[arg-type]
