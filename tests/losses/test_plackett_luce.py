"""What must be true of the ranking losses: PLD, ListMLE, position-aware ListMLE."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import fixed_places, plackett_luce, pld, teacher_places, teacher_ranking
from limbeck.losses.plackett_luce import Weighting

seeds = st.integers(0, 2**31)
weightings = pytest.mark.parametrize("weighting", get_args(Weighting))


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed: int, classes: int = 6, items: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(classes, (items,), generator=torch.Generator().manual_seed(seed + 2))
    return draw(seed, items, classes).requires_grad_(), draw(seed + 1, items, classes), labels


def one_by_one(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    """The loss as the paper says it, choice after choice."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        left = sorted((c for c in range(len(s)) if c != label), key=lambda c: -t[c].item())
        shares = (t / tau).softmax(-1)
        order = [label, *left]
        for place, chosen in enumerate(order):
            total = total + shares[chosen] * (s[order[place:]].logsumexp(-1) - s[chosen])
    return total / len(student)


@given(seeds, st.floats(0.5, 4))
def test_it_is_the_likelihood_of_choices_without_replacement(seed: int, tau: float) -> None:
    student, teacher, labels = case(seed)
    loss, plain = pld(student, teacher, labels, tau), one_by_one(student, teacher, labels, tau)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, plain)))


@given(seeds)
def test_the_first_place_alone_is_cross_entropy(seed: int) -> None:
    student, teacher, labels = case(seed)
    loss, plain = pld(student, teacher, labels, weighting="first"), F.cross_entropy(student, labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, plain)))


@weightings
def test_constants_per_row_change_nothing_and_a_scale_does(weighting: Weighting) -> None:
    student, teacher, labels = case(0)
    shift, plain = draw(3, 4, 1), pld(student, teacher, labels, weighting=weighting)
    moved = pld(student + shift, teacher - 2 * shift, labels, weighting=weighting)
    torch.testing.assert_close(moved, plain)
    assert abs(pld(2 * student, teacher, labels, weighting=weighting) - plain) > 0.1


@weightings
@given(seeds)
def test_convex_with_gradient_rows_that_sum_to_zero(weighting: Weighting, seed: int) -> None:
    student, teacher, labels = case(seed, classes=4, items=2)
    loss = pld(student, teacher, labels, weighting=weighting)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    assert loss >= 0
    torch.testing.assert_close(grad.sum(-1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    hessian = torch.autograd.functional.hessian(
        lambda row: pld(row[None], teacher[:1], labels[:1], weighting=weighting), student[0].detach()
    )
    assert torch.linalg.eigvalsh(hessian).min() > -1e-10


def test_limits_of_the_temperature() -> None:
    student, teacher, _ = case(0)
    labels = teacher.argmax(-1)
    torch.testing.assert_close(pld(student, teacher, labels, 1e-3), F.cross_entropy(student, labels))
    flat = pld(student, teacher, labels, 1e9)
    torch.testing.assert_close(flat, pld(student, teacher, labels, weighting="uniform"))


@given(seeds)
def test_two_classes_give_the_teachers_share_of_cross_entropy(seed: int) -> None:
    student, teacher, labels = case(seed, classes=2)
    share = (teacher / 2).softmax(-1).gather(-1, labels[:, None])[:, 0]
    plain = (share * F.cross_entropy(student, labels, reduction="none")).mean()
    torch.testing.assert_close(pld(student, teacher, labels, 2), plain)


def test_the_true_class_is_first_whatever_the_teacher_says() -> None:
    teacher, labels = torch.tensor([[3.0, 1, 2, 1]]), torch.tensor([1])
    ranking = teacher_ranking(teacher, labels)
    assert ranking.tolist() == [[1, 0, 2, 3]]
    shares = teacher.softmax(-1)[0]
    assert teacher_places(teacher, ranking, 1)[0].tolist() == shares[[1, 0, 2, 3]].tolist()


def test_ties_go_by_class() -> None:
    assert teacher_ranking(torch.zeros(1, 5), torch.tensor([2])).tolist() == [[2, 0, 1, 3, 4]]


def test_a_teacher_of_the_same_order_changes_the_weights_alone() -> None:
    student, teacher, labels = case(0)
    calm = teacher.sign() * teacher.abs().sqrt()
    assert torch.equal(teacher_ranking(teacher, labels), teacher_ranking(calm, labels))
    assert pld(student, teacher, labels) != pld(student, calm, labels)
    same = [pld(student, t, labels, weighting="uniform") for t in (teacher, calm)]
    assert same[0] == same[1]


@weightings
def test_the_numbering_of_the_classes_does_not_matter(weighting: Weighting) -> None:
    student, teacher, labels = case(0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = pld(student[:, order], teacher[:, order], order.argsort()[labels], weighting=weighting)
    torch.testing.assert_close(moved, pld(student, teacher, labels, weighting=weighting))


@weightings
def test_one_class_gives_zero_and_no_item_is_refused(weighting: Weighting) -> None:
    student, teacher, labels = case(0, classes=1)
    loss = pld(student, teacher, labels, weighting=weighting)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert grad.abs().max() == 0
    with pytest.raises(ShapeError, match=r"\[0, 6\].*at least one item"):
        pld(*case(0, items=0), weighting=weighting)


@weightings
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_teacher_is_seen(weighting: Weighting, bad: float) -> None:
    student, teacher, labels = case(0)
    teacher[1, 2] = bad
    items = pld(student, teacher, labels, weighting=weighting, reduction="none")
    assert torch.isnan(items).tolist() == [False, True, False, False]


@weightings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits_stay_finite(weighting: Weighting, dtype: torch.dtype) -> None:
    student = torch.tensor([[200.0, -200, 0], [-200, 200, 200]], dtype=dtype, requires_grad=True)
    loss = pld(student, -student.detach(), torch.tensor([0, 1]), weighting=weighting)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("classes", [2, 60, 61, 1000, 5000])
def test_position_weights_fall_and_never_overflow(classes: int) -> None:
    places = fixed_places("position", classes)
    assert torch.isfinite(places.float()).all()
    assert (places.diff() <= 0).all()
    assert places[-1] == 0
    if classes <= 60:
        assert places.tolist() == pytest.approx([2 ** (classes - k) - 1 for k in range(1, classes + 1)])
    else:
        torch.testing.assert_close(places.sum(), torch.ones((), dtype=torch.float64))


def test_all_weightings_have_one_scale() -> None:
    """Where the student is even, L_k is log of the number of classes left."""
    teacher, labels, classes = draw(0, 4, 70), torch.arange(4), 70
    left = torch.arange(classes, 0, -1, dtype=torch.float64).log()
    even = torch.zeros(4, classes, dtype=torch.float64)
    for weighting in ("first", "uniform", "position"):
        places = fixed_places(weighting, classes)
        expected = (places / places.sum() * left).sum()
        torch.testing.assert_close(pld(even, teacher, labels, weighting=weighting), expected)


def test_dense_prediction_drops_ignored_labels() -> None:
    student, teacher = draw(0, 2, 5, 3, 4), draw(1, 2, 5, 3, 4)
    labels = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    labels[0, 1] = 255
    labels[1, :, 3] = -100
    counts = (labels >= 0) & (labels < 5)
    by_class = student.movedim(1, -1), teacher.movedim(1, -1)
    loss = pld(*by_class, labels, mask=counts)
    flat = pld(by_class[0][counts], by_class[1][counts], labels[counts])
    torch.testing.assert_close(loss, flat)


def test_no_gradient_reaches_teacher_or_weights() -> None:
    student, teacher, labels = case(0)
    teacher.requires_grad_()
    pld(student, teacher, labels).backward()
    assert teacher.grad is None
    places = torch.ones(6, dtype=torch.float64, requires_grad=True)
    plackett_luce(student, teacher_ranking(teacher, labels), places).backward()
    assert places.grad is None


def test_sample_weights_scale() -> None:
    student, teacher, labels = case(0)
    weights = torch.tensor([1.0, 2, 0, 1], dtype=torch.float64)
    items = pld(student, teacher, labels, reduction="none")
    torch.testing.assert_close(pld(student, teacher, labels, weights=weights), (weights * items).mean())


def test_wrong_arguments_are_named() -> None:
    student, teacher, labels = case(0)
    with pytest.raises(ShapeError, match=r"\[4, 6\].*\[4, 5\]"):
        pld(student, teacher[:, :5], labels)
    with pytest.raises(ShapeError, match="rank every class"):
        plackett_luce(student, torch.zeros(4, 5, dtype=torch.int64), torch.ones(6))
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        pld(student, teacher, labels, weighting="unifrom")  # type: ignore[arg-type]
