"""FIRST: the teacher's top tokens, re-calibrated, with the rest as one more outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.objectives import texts
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.errors import ConfigError, GuardError
from limbeck.losses.first import (
    Scaling,
    first_loss,
    label_smooth,
    linear_normalise,
    recalibrate,
    target_with_rest,
)
from limbeck.objectives.first import FIRST

OWN, OTHER, K = 4, 6, 5


def built(**fields: Any) -> Any:
    return FIRST(**fields).build(texts.said(1, OWN), texts.said(2, OTHER))


def term(student: Outputs, teacher: Outputs, **fields: Any) -> Tensor:
    found: Tensor = built(**fields)(student, teacher, texts.batch(), Progress())["first"]
    return found


def shortened(teacher: Outputs, kept: int, dtype: torch.dtype = torch.float64) -> Outputs:
    """What a cache keeps of a teacher."""
    ids = teacher.logits.topk(kept).indices
    shares = teacher.logits.log_softmax(-1).gather(1, ids)
    return Outputs(logits=torch.empty(len(ids), 0), top=(ids, shares.to(dtype)))


class Validation:
    """A ``contracts.Course`` with a teacher and some texts that are held out.

    Attributes:
        kept: what was computed once.
    """

    def __init__(self, teacher: Outputs, held_out: int = 1) -> None:
        self.teacher, self.held_out, self.kept = teacher, torch.arange(held_out), dict[str, Any]()

    def batches(self, index: Tensor) -> Iterator[Batch]:
        yield texts.batch()

    def ask(self, batch: Batch) -> Outputs:
        return self.teacher

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        return self.kept.setdefault(name, compute())


@pytest.mark.parametrize("scaling", ["linear", "power", "probability"])
def test_it_is_the_loss_over_the_kept_tokens_and_the_rest(scaling: Scaling) -> None:
    student, teacher = texts.said(1, OWN, grad=True), texts.said(2, OTHER)
    found = term(student, teacher, scaling=scaling, c=0.7)
    probs, ids = teacher.logits.softmax(-1).topk(K)
    c = 1.0 if scaling == "linear" else 0.7
    logits = student.logits.detach().requires_grad_()
    plain = first_loss(logits, ids, target_with_rest(probs, scaling, c), eps=1e-12)
    torch.testing.assert_close(found.detach(), plain.detach(), rtol=1e-5, atol=1e-7)
    (own,), (slope,) = torch.autograd.grad(found, student.hidden), torch.autograd.grad(plain, logits)
    assert student.unembedding is not None
    torch.testing.assert_close(own, slope @ student.unembedding.weight, rtol=1e-4, atol=1e-6)


def test_without_the_rest_other_tokens_do_not_count() -> None:
    student, teacher = texts.said(1, OWN), texts.said(2, OTHER)
    probs, ids = teacher.logits.softmax(-1).topk(K)
    found = term(student, teacher, rest=False, scaling="power", c=2.0)
    plain = first_loss(student.logits, ids, recalibrate(probs, "power", 2.0), eps=1e-12)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-7)


def test_with_all_tokens_it_is_kl() -> None:
    student, teacher = texts.said(1, OWN), texts.said(2, OTHER)
    found = term(student, teacher, k=texts.VOCABULARY, rest=False)
    plain = losses.token_divergence(losses.ForwardKL(), student.logits, teacher.logits)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn() -> None:
    teacher = texts.said(2, OTHER, grad=True)
    found = term(teacher, teacher.detach())
    (grad,) = torch.autograd.grad(found, teacher.hidden)
    assert found < 1e-5
    assert grad.abs().max() < 1e-5


def test_what_is_smoothed_is_the_teacher() -> None:
    student, teacher = texts.said(1, OWN), texts.said(2, OTHER)
    probs, ids = teacher.logits.softmax(-1).topk(K)
    smooth = label_smooth(probs, 0.1)
    found = term(student, teacher, rest=False, delta=0.1)
    torch.testing.assert_close(
        found, first_loss(student.logits, ids, linear_normalise(smooth), eps=1e-12), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_stored_tokens_give_what_the_teacher_gives(dtype: torch.dtype, near: float) -> None:
    student, teacher = texts.said(1, OWN), texts.said(2, OTHER)
    live = term(student, teacher, scaling="power", c=1.5)
    for kept in (K, 8):
        found = term(student, shortened(teacher, kept, dtype), scaling="power", c=1.5)
        torch.testing.assert_close(found, live, rtol=near, atol=near)


def test_more_tokens_than_were_stored_are_refused() -> None:
    with pytest.raises(ConfigError, match="k is 5 but only 3 tokens"):
        term(texts.said(1, OWN), shortened(texts.said(2, OTHER), 3))


def test_the_temperature_is_chosen_on_the_validation_part() -> None:
    sure = texts.said(2, OTHER)
    assert sure.hidden is not None
    sure = replace(sure, hidden=30 * sure.hidden)  # and mostly wrong
    module, course = built(scaling="power", grid=(0.5, 1.0, 20.0)), Validation(sure)
    with pytest.raises(GuardError, match="no temperature yet"):
        module(texts.said(1, OWN), sure, texts.batch(), Progress())
    module.prepare(course)
    facts = module.facts()
    assert facts["c"] == module.c == 20.0
    assert list(facts["errors"]) == ["0.5", "1", "20"]
    assert min(facts["errors"].values()) == facts["errors"]["20"]
    assert facts["c_at_the_end_of_grid"]
    assert facts["coverage"] == pytest.approx(1, abs=1e-5)
    again = built(scaling="power", grid=(0.5, 1.0, 20.0))
    again.prepare(SimpleNamespace(held_out=course.held_out, once=lambda name, _: course.kept[name]))
    assert again.facts() == facts


def test_a_temperature_that_is_set_stays() -> None:
    module = built(scaling="probability", c=0.3)
    module.prepare(Validation(texts.said(2, OTHER)))
    assert module.facts()["c"] == 0.3
    assert "errors" not in module.facts()


def test_without_a_validation_part_a_temperature_must_be_set() -> None:
    with pytest.raises(ConfigError, match=r"raise data\.validation"):
        built(scaling="power").prepare(Validation(texts.said(2, OTHER), held_out=0))
    built(scaling="power", c=2.0).prepare(Validation(texts.said(2, OTHER), held_out=0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": 1}, "k is 1"),
        ({"c": 0.0}, "c is 0.0"),
        ({"grid": ()}, "grid is empty"),
        ({"grid": (1.0, -1.0)}, "grid is -1.0"),
        ({"delta": 0.1, "scaling": "power"}, "not both"),
        ({"scaling": "powr"}, "power"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FIRST(**fields)
