"""What must be true of decoupled KD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import decoupled_kl, kl_divergence

seeds = st.integers(0, 2**31)


def case(seed: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 5, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher, torch.randint(classes, (5,), generator=generator)


@given(seeds, st.integers(2, 9), st.floats(0.5, 20))
def test_kd_is_the_target_part_plus_the_rest_by_its_share(
    seed: int, classes: int, temperature: float
) -> None:
    student, teacher, labels = case(seed, classes)
    target, rest = decoupled_kl(student, teacher, labels, temperature, reduction="none")
    share = (teacher / temperature).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    whole = kl_divergence(student, teacher, temperature, reduction="none")
    torch.testing.assert_close(target + (1 - share) * rest, whole, rtol=1e-8, atol=1e-10)


@given(seeds)
def test_two_classes_leave_no_rest(seed: int) -> None:
    student, teacher, labels = case(seed, 2)
    target, rest = decoupled_kl(student, teacher, labels)
    (grad,) = torch.autograd.grad(target + rest, student)
    assert rest.item() == 0
    assert torch.isfinite(grad).all()


@given(seeds)
def test_target_part_ignores_the_order_of_the_others(seed: int) -> None:
    student, teacher, _ = case(seed, 6)
    labels = torch.zeros(5, dtype=torch.long)
    order = torch.tensor([0, 5, 3, 1, 2, 4])
    target, _ = decoupled_kl(student, teacher, labels)
    torch.testing.assert_close(decoupled_kl(student[:, order], teacher, labels)[0], target)


def test_one_class_gives_zero_and_no_nan() -> None:
    student, teacher, labels = case(0, 1)
    target, rest = decoupled_kl(student, teacher, labels)
    (grad,) = torch.autograd.grad(target + 8 * rest, student)
    assert target.item() == rest.item() == 0
    assert grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_large_logits_in_half_precision_stay_finite(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[200.0, -200, 0], [-200, 200, 200]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-200.0, 200, 0], [200, -200, -200]], dtype=dtype)
    target, rest = decoupled_kl(student, teacher, torch.tensor([0, 0]), temperature)
    (target + rest).backward()
    assert torch.isfinite(target)
    assert torch.isfinite(rest)
    assert torch.isfinite(student.grad).all()


@given(seeds)
def test_zero_where_student_equals_teacher(seed: int) -> None:
    _, teacher, labels = case(seed, 6)
    student = (teacher + 3).requires_grad_()
    target, rest = decoupled_kl(student, teacher, labels)
    (grad,) = torch.autograd.grad(target + rest, student)
    assert abs(target.item()) + abs(rest.item()) < 1e-10
    assert grad.abs().max() < 1e-10


def test_a_broken_teacher_is_seen() -> None:
    student, teacher, labels = case(0, 6)
    teacher[1, 2] = torch.nan
    target, rest = decoupled_kl(student, teacher, labels)
    assert torch.isnan(target)
    assert torch.isnan(rest)
