"""What must be true of KL with a mean over texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import kl_divergence, sequence_kl

seeds = st.integers(0, 2**31)
directions = st.sampled_from(["forward", "reverse"])


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@given(seeds, st.floats(0.5, 5))
def test_equal_lengths_are_a_mean_over_tokens(seed: int, temperature: float) -> None:
    student, teacher = pair(seed)
    loss = sequence_kl(student, teacher, torch.ones(3, 6), temperature)
    torch.testing.assert_close(loss, kl_divergence(student, teacher, temperature), rtol=1e-6, atol=0)


@given(seeds)
def test_the_squared_temperature_keeps_the_gradients_scale(seed: int) -> None:
    student, teacher = pair(seed)
    norms = [
        torch.autograd.grad(sequence_kl(student, teacher, torch.ones(3, 6), t), student)[0].norm().item()
        for t in (50.0, 100.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


@given(seeds, directions)
def test_padding_has_no_influence(seed: int, direction: str) -> None:
    student, teacher = pair(seed)
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [0] * 6])  # the last text is all padding
    whole = sequence_kl(student[:1], teacher[:1], mask[:1], 2.0, direction)  # type: ignore[arg-type]
    short = sequence_kl(student[1:2, :2], teacher[1:2, :2], mask[1:2, :2], 2.0, direction)  # type: ignore[arg-type]
    wanted = (whole + short) / 2
    (grad,) = torch.autograd.grad(wanted, student)
    with torch.no_grad():
        student[mask == 0], teacher[mask == 0] = torch.nan, torch.nan
    loss = sequence_kl(student, teacher, mask, 2.0, direction)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], grad)


@given(seeds, directions)
def test_zero_where_student_equals_teacher(seed: int, direction: str) -> None:
    _, teacher = pair(seed)
    student = (teacher + 1).requires_grad_()
    loss = sequence_kl(student, teacher, torch.ones(3, 6), 1.0, direction)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-8  # not 0: eps is not normalised


def test_nothing_to_count_and_wrong_arguments() -> None:
    student, teacher = pair(0)
    loss = sequence_kl(student, teacher, torch.zeros(3, 6))
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()
    with pytest.raises(ConfigError, match="direction 'both'"):
        sequence_kl(student, teacher, torch.ones(3, 6), 1.0, "both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one value per token"):
        sequence_kl(student, teacher, torch.ones(3, 5))
