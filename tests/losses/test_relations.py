"""What must be true of relations between samples: similarities, distances, angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from limbeck.errors import ShapeError
from limbeck.losses import (
    angle_relations,
    angles,
    distance_relations,
    distances,
    relations,
    similarities,
    similarity_relations,
)
from limbeck.losses.relations import Gram

Loss = Callable[..., Tensor]
LOSSES = [similarity_relations, distance_relations, angle_relations]
every = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, **how)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@every
@given(count=st.integers(1, 9), rows=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_parts_give_the_same_value_and_gradient(loss: Loss, count: int, rows: int, seed: int) -> None:
    student, teacher = draw(seed, count, 5), draw(seed + 100, count, 7)
    weights = draw(seed + 200, count).abs()
    for how in ({}, {"weights": weights}, {"reduction": "none"}):
        plain = value_and_gradient(loss, student, teacher, rows=count, **how)
        parts = value_and_gradient(loss, student, teacher, rows=rows, **how)
        torch.testing.assert_close(parts, plain, rtol=1e-10, atol=1e-12)


def test_the_plain_forms_are_the_definitions() -> None:
    x = draw(0, 6, 4)
    torch.testing.assert_close(similarities(x), F.normalize(x @ x.T, dim=1))
    torch.testing.assert_close(distances(x), torch.cdist(x, x))
    sides = F.normalize(x[None] - x[:, None], dim=2)
    torch.testing.assert_close(angles(x), torch.einsum("ijd,ikd->ijk", sides, sides))


def test_losses_are_means_over_all_relations() -> None:
    student, teacher = draw(0, 6, 4), draw(1, 6, 9)
    squares = (similarities(student) - similarities(teacher)).square().sum() / 36
    torch.testing.assert_close(similarity_relations(student, teacher), squares)
    own, other = (torch.cdist(x, x) for x in (student, teacher))
    own, other = own / own[own > 0].mean(), other / other[other > 0].mean()
    torch.testing.assert_close(distance_relations(student, teacher), F.smooth_l1_loss(own, other))
    cosines = F.smooth_l1_loss(angles(student), angles(teacher))
    torch.testing.assert_close(angle_relations(student, teacher), cosines)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(draw(9, width, width)).Q


@every
def test_scale_and_rotation_of_either_side_change_nothing(loss: Loss) -> None:
    student, teacher = draw(0, 6, 4), draw(1, 6, 9)
    plain = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student @ rotation(4), teacher), plain)
    torch.testing.assert_close(loss(student, 0.2 * teacher @ rotation(9)), plain)


@pytest.mark.parametrize("loss", [distance_relations, angle_relations])
def test_translation_changes_nothing(loss: Loss) -> None:
    student, teacher = draw(0, 6, 4), draw(1, 6, 9)
    torch.testing.assert_close(loss(student + 5, teacher - 3), loss(student, teacher))


def test_a_large_offset_costs_no_digits() -> None:
    x = draw(0, 6, 4)
    torch.testing.assert_close(distances((x + 1000).float()), distances(x).float(), rtol=1e-3, atol=0)


@every
def test_equal_features_have_equal_relations(loss: Loss) -> None:
    assert loss(draw(0, 6, 4), 2 * draw(0, 6, 4)) < 1e-12


@every
def test_one_sample_has_no_relation_to_match(loss: Loss) -> None:
    value, grad = value_and_gradient(loss, draw(0, 1, 4), draw(1, 1, 9))
    assert value == 0
    assert torch.isfinite(grad).all()


@every
def test_samples_that_are_the_same_give_finite_gradients(loss: Loss) -> None:
    x, y = draw(0, 6, 4), draw(1, 6, 9)
    value, grad = value_and_gradient(loss, x[[0, 0, 1, 2, 3, 3]], y[[0, 0, 1, 2, 3, 3]])
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


@every
def test_half_precision_and_large_values_stay_finite(loss: Loss) -> None:
    value = loss(200 * draw(0, 6, 4).half(), 200 * draw(1, 6, 9).half())
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


@every
def test_autocast_does_not_lower_the_precision(loss: Loss) -> None:
    student, teacher = draw(0, 6, 4).float(), draw(1, 6, 9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(student, teacher)
    torch.testing.assert_close(low, loss(student, teacher))


@every
def test_the_teacher_gets_no_gradient_and_its_nan_is_seen(loss: Loss) -> None:
    student, teacher = draw(0, 6, 4).requires_grad_(), draw(1, 6, 9).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    broken = teacher.detach().clone()
    broken[2, 3] = torch.nan
    assert loss(student, broken).isnan()


@every
def test_samples_are_compared(loss: Loss) -> None:
    with pytest.raises(ShapeError, match=r"\[6, 4\].*\[5, 4\].*the same samples"):
        loss(draw(0, 6, 4), draw(1, 5, 4))


def test_distances_are_between_vectors() -> None:
    with pytest.raises(ShapeError, match=r"give vectors \[N, D\]"):
        distance_relations(draw(0, 6, 4, 2, 2), draw(1, 6, 4, 2, 2))


def kept(loss: Loss, student: Tensor, teacher: Tensor) -> int:
    """Entries that a forward pass holds for its backward pass, each tensor once."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss(student, teacher)
    return sum(held.values())


@every
def test_large_batches_keep_no_relation_for_the_backward_pass(
    loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = draw(0, 64, 4).requires_grad_(), draw(1, 64, 4)
    plain = kept(loss, student, teacher)
    monkeypatch.setattr(relations, "ENTRIES", 256)
    assert plain >= 64 * 64
    assert kept(loss, student, teacher) < 64 * 64


def test_the_gradient_of_all_products_is_that_of_autograd() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Gram.apply, x)
    assert torch.autograd.gradgradcheck(Gram.apply, x)
