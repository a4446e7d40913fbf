"""What must be true of hints and knowledge review."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses import hcl, hcl_stage, hint_mse, token_review


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hint_is_the_mean_over_elements() -> None:
    student, teacher = features(0, 3, 4, 5), features(1, 3, 4, 5)
    torch.testing.assert_close(hint_mse(student, teacher), (student - teacher).square().mean())


def test_hint_counts_tokens_by_mask_and_samples_by_weight() -> None:
    student, teacher = features(0, 3, 4, 5), features(1, 3, 4, 5)
    error = (student - teacher).square().mean(-1)
    mask = torch.tensor([[True, True, False, False]] * 3)
    weights = torch.tensor([3.0, 0, 0])
    torch.testing.assert_close(hint_mse(student, teacher, mask=mask), error[mask].mean())
    torch.testing.assert_close(hint_mse(student, teacher, weights=weights), error[0].mean())


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = features(0, 2, 3, 4, 4).requires_grad_(), features(1, 2, 3, 4, 4).requires_grad_()
    hcl([student], [teacher]).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_hcl_of_equal_maps_is_zero() -> None:
    assert hcl_stage(features(0, 2, 3, 8, 8), features(0, 2, 3, 8, 8)) == 0


def test_hcl_of_one_pixel_is_plain_mse() -> None:
    student, teacher = features(0, 2, 3, 1, 1), features(1, 2, 3, 1, 1)
    torch.testing.assert_close(hcl_stage(student, teacher), hint_mse(student, teacher))


def test_hcl_of_two_pixels_uses_level_one_at_half_weight() -> None:
    student, teacher = features(0, 2, 3, 2, 2), features(1, 2, 3, 2, 2)
    pooled = hint_mse(student.mean((2, 3)), teacher.mean((2, 3)))
    expected = (hint_mse(student, teacher) + 0.5 * pooled) / 1.5
    torch.testing.assert_close(hcl_stage(student, teacher), expected)


def test_hcl_sums_over_stages_and_tokens_average_over_blocks() -> None:
    a, b = features(0, 2, 3, 4, 4), features(1, 2, 3, 4, 4)
    torch.testing.assert_close(hcl([a, a], [b, b]), 2 * hcl_stage(a, b))
    x, y = features(0, 2, 3, 4), features(1, 2, 3, 4)
    torch.testing.assert_close(token_review([x, x], [y, y]), hint_mse(x, y))


def test_shapes_are_compared() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3, 4\].*\[2, 3, 5\]"):
        hint_mse(features(0, 2, 3, 4), features(0, 2, 3, 5))
