"""What must be true of DIST's correlations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses import dist, pearson

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_correlation_agrees_with_numpy(seed: int) -> None:
    a, b = draw(seed, 7), draw(seed + 1, 7)
    weights = draw(seed + 2, 7).abs()
    torch.testing.assert_close(pearson(a, b).item(), np.corrcoef(a, b)[0, 1])
    cov = np.cov(a, b, aweights=weights, ddof=0)
    weighted = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    torch.testing.assert_close(pearson(a, b, weights).item(), weighted, rtol=1e-6, atol=1e-8)


@given(seeds, st.floats(0.5, 4))
def test_a_constant_per_row_changes_nothing_and_the_range_holds(seed: int, temperature: float) -> None:
    student, teacher, shift = draw(seed, 6, 5), draw(seed + 1, 6, 5), draw(seed + 2, 6, 1)
    plain, moved = dist(student, teacher, temperature), dist(student + shift, teacher, temperature)
    for one, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(one, other)
        assert 0 <= one <= 2 * temperature**2


def test_zero_where_the_distributions_are_a_positive_affine_map_of_each_other() -> None:
    """By row and by column: p = 1/C + c (q - 1/C) with one c for all."""
    teacher = F.softmax(draw(0, 6, 5) / 6, dim=-1)
    student = 0.2 + 0.5 * (teacher - 0.2)
    for part in dist(student.log(), teacher.log()):
        assert abs(part) < 1e-6


def test_opposed_distributions_give_the_largest_value() -> None:
    teacher = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    inter, intra = dist((1 - teacher).log(), teacher.log())
    torch.testing.assert_close(torch.stack([inter, intra]), torch.full((2,), 2.0, dtype=torch.float64))


def test_one_sample_has_no_relation_between_samples() -> None:
    student = draw(0, 1, 5).requires_grad_()
    inter, intra = dist(student, draw(1, 1, 5), 4)
    (inter + intra).backward()
    assert intra == 16
    assert torch.isfinite(student.grad).all()
    assert dist(draw(0, 3, 1), draw(1, 3, 1))[0] == 1


def test_the_teacher_gets_no_gradient_and_a_broken_one_is_seen() -> None:
    teacher = draw(1, 4, 5).requires_grad_()
    sum(dist(draw(0, 4, 5).requires_grad_(), teacher)).backward()
    assert teacher.grad is None
    with torch.no_grad():
        teacher[0, 0] = torch.nan
    assert all(torch.isnan(part) for part in dist(draw(0, 4, 5), teacher))


def test_masked_out_items_do_not_count() -> None:
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    teacher[4:] = torch.nan
    mask = torch.arange(6) < 4
    for one, other in zip(dist(student, teacher, mask=mask), dist(student[:4], teacher[:4]), strict=True):
        torch.testing.assert_close(one, other)
    assert all(part == 0 for part in dist(student, teacher, mask=torch.zeros(6, dtype=torch.bool)))


def test_a_weight_of_two_is_a_sample_twice() -> None:
    student, teacher = draw(0, 4, 5), draw(1, 4, 5)
    twice = torch.tensor([0, 0, 1, 2, 3])
    weights = torch.tensor([2.0, 1, 1, 1], dtype=torch.float64)
    for one, other in zip(
        dist(student, teacher, weights=weights), dist(student[twice], teacher[twice]), strict=True
    ):
        torch.testing.assert_close(one, other * 5 / 4)


def test_pixels_are_items() -> None:
    student, teacher = draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4, 5)
    flat = dist(student.reshape(-1, 5), teacher.reshape(-1, 5))
    for one, other in zip(dist(student, teacher), flat, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision_stay_finite(dtype: torch.dtype) -> None:
    student = torch.tensor([[200.0, -200, 0], [-200, 200, 200]], dtype=dtype, requires_grad=True)
    parts = dist(student, torch.tensor([[-200.0, 200, 0], [200, -200, -200]], dtype=dtype))
    sum(parts).backward()
    assert all(part.dtype == torch.float32 and torch.isfinite(part) for part in parts)
    assert torch.isfinite(student.grad).all()


def test_shapes_are_compared() -> None:
    with pytest.raises(ShapeError, match=r"\[4, 6\].*\[4, 5\]"):
        dist(draw(0, 4, 6), draw(1, 4, 5))
