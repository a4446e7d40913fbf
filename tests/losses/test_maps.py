"""What must be true of the losses on maps: attention, neuron selectivity, variational information."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses import (
    at_one_size,
    attention,
    attention_transfer,
    neuron_selectivity,
    variational_information,
)
from limbeck.losses.attention import MeanSquare

Loss = Callable[..., Tensor]
on_maps = pytest.mark.parametrize("loss", [attention_transfer, neuron_selectivity], ids=lambda f: f.__name__)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_side_takes_the_smaller_of_both() -> None:
    own, other = at_one_size(draw(0, 2, 3, 8, 4), draw(1, 2, 5, 4, 6))
    assert own.shape == (2, 3, 4, 4)
    assert other.shape == (2, 5, 4, 4)
    x = draw(0, 2, 3, 4, 4)
    assert at_one_size(x, draw(1, 2, 5, 9, 9))[0] is x


@on_maps
def test_what_is_no_map_says_so(loss: Loss) -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3, 4\].*give maps \[B, C, H, W\]"):
        loss(draw(0, 2, 3, 4), draw(1, 2, 3, 4, 4))


@on_maps
def test_the_larger_map_is_pooled_before_anything_else(loss: Loss) -> None:
    student, teacher = draw(0, 3, 4, 8, 8), draw(1, 3, 6, 4, 4)
    torch.testing.assert_close(loss(student, teacher), loss(F.adaptive_avg_pool2d(student, 4), teacher))
    torch.testing.assert_close(loss(teacher, student), loss(teacher, F.adaptive_avg_pool2d(student, 4)))


@on_maps
def test_positive_factors_of_either_map_change_nothing(loss: Loss) -> None:
    student, teacher = draw(0, 3, 4, 5, 5), draw(1, 3, 6, 5, 5)
    torch.testing.assert_close(loss(7 * student, 0.1 * teacher), loss(student, teacher))


@on_maps
def test_the_order_of_the_channels_does_not_matter(loss: Loss) -> None:
    x = draw(0, 3, 6, 5, 5)
    assert loss(x, x[:, torch.tensor([3, 0, 5, 1, 4, 2])]).abs() < 1e-15
    assert loss(x, draw(1, 3, 4, 5, 5)) > 1e-4


@on_maps
def test_an_item_is_a_sample(loss: Loss) -> None:
    student, teacher = draw(0, 3, 4, 5, 5), draw(1, 3, 6, 5, 5)
    items = loss(student, teacher, reduction="none")
    assert items.shape == (3,)
    assert (items >= 0).all()
    torch.testing.assert_close(items[1], loss(student[1:2], teacher[1:2]))
    weighed = loss(student, teacher, weights=torch.tensor([0.0, 3.0, 0.0]))
    torch.testing.assert_close(weighed, items[1])


@on_maps
def test_half_precision_large_values_and_dead_maps_stay_finite(loss: Loss) -> None:
    student, teacher = 200 * draw(0, 3, 4, 5, 5).half(), 200 * draw(1, 3, 6, 5, 5).half()
    student[0] = 0
    leaf = student.requires_grad_()
    value = loss(leaf, teacher)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    (grad,) = torch.autograd.grad(value, leaf)
    assert torch.isfinite(grad).all()


@on_maps
def test_the_teacher_gets_no_gradient_and_its_nan_is_seen(loss: Loss) -> None:
    student, teacher = draw(0, 2, 3, 4, 4).requires_grad_(), draw(1, 2, 3, 4, 4).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert loss(student, teacher.detach().clone().fill_(torch.nan)).isnan()


def test_squares_are_averaged_with_the_gradient_of_the_plain_way() -> None:
    x = draw(0, 2, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(MeanSquare.apply, x)
    assert torch.autograd.gradgradcheck(MeanSquare.apply, x)
    torch.testing.assert_close(MeanSquare.apply(x), x.abs().pow(2.0).mean(1))


def test_attention_has_length_one_and_is_where_the_activity_is() -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[0, :, 1, 2] = torch.tensor([1.0, -2.0, 3.0])
    found = attention(x)
    assert found.argmax() == 1 * 4 + 2
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))


def test_a_higher_power_looks_at_the_peak() -> None:
    x = draw(0, 2, 3, 4, 4)
    assert (attention(x, 4).amax(1) > attention(x, 1).amax(1)).all()


def test_the_best_variance_is_the_mean_squared_error() -> None:
    guess, teacher = draw(0, 4, 3, 5, 5), draw(1, 4, 3, 5, 5)
    best = (guess - teacher).square().mean((0, 2, 3))
    leaf = best.clone().requires_grad_()
    (grad,) = torch.autograd.grad(variational_information(guess, teacher, leaf), leaf)
    assert grad.abs().max() < 1e-12
    lowest = variational_information(guess, teacher, best)
    assert all(variational_information(guess, teacher, best * factor) > lowest for factor in (0.8, 1.2))


def test_information_is_the_normal_likelihood_without_its_constant() -> None:
    guess, teacher, variance = draw(0, 4, 3, 5, 5), draw(1, 4, 3, 5, 5), draw(2, 3).exp()
    normal = torch.distributions.Normal(guess, variance.sqrt()[:, None, None])
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    expected = -normal.log_prob(teacher).mean() - constant
    torch.testing.assert_close(variational_information(guess, teacher, variance), expected)
