"""ULD: a teacher with tokens of its own, matched by its sorted probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives import texts

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress, Unembedding
from limbeck.errors import ConfigError
from limbeck.losses.sorted_tokens import sorted_l1
from limbeck.objectives.uld import ULD, answered, spread

OTHER_ROWS = torch.tensor([0, 1, 4, 5, 6, 7, 8])  # of three texts of four tokens: 2, 4 and 1 count


def batch() -> Batch:
    own = texts.batch()
    other = replace(own, inputs=own.inputs[:, :4], rows=OTHER_ROWS, labels=own.labels[:7], marks={})
    return replace(own, other=other)


def answers() -> tuple[Outputs, Outputs]:
    return texts.said(1, 4, grad=True), texts.said(2, 6, rows=7, vocabulary=14)


def found(student: Outputs, teacher: Outputs, given: Batch, **fields: Any) -> torch.Tensor:
    return ULD(**fields).terms(student, teacher, given, Progress())["uld"]


def test_it_pairs_the_first_tokens_of_both_answers() -> None:
    student, teacher = answers()
    own, other = student.logits, teacher.logits
    pairs = [((0, 1), (0, 1)), ((3, 4), (2, 3)), ((5,), (6,))]  # rows of the texts; they have 3, 2 and 4
    means = [sorted_l1(own[list(a)], other[list(b)]).mean() for a, b in pairs]
    torch.testing.assert_close(found(student, teacher, batch(), weight=1.0), torch.stack(means).mean())


def test_the_spread_rows_are_where_the_batch_has_them() -> None:
    own = texts.batch()
    values = torch.arange(1.0, 10)
    assert spread(values, own).flatten()[texts.ROWS].equal(values)
    assert spread(values, own).sum() == values.sum()
    assert answered(own).flatten().nonzero().flatten().equal(texts.ROWS)


def test_neither_vocabulary_has_an_order() -> None:
    student, teacher = answers()
    plain = found(student, teacher, batch())
    head = teacher.unembedding
    assert head is not None
    turned = replace(teacher, unembedding=Unembedding(head.weight[torch.randperm(14)]))
    torch.testing.assert_close(found(student, turned, batch()), plain)


def test_gradient_reaches_the_student_alone() -> None:
    student, teacher = answers()
    assert teacher.hidden is not None
    teacher.hidden.requires_grad_()
    found(student, teacher, batch()).backward()
    assert student.hidden is not None and student.hidden.grad is not None
    assert student.hidden.grad.abs().max() > 0
    assert teacher.hidden.grad is None


def test_weights_are_the_tokens() -> None:
    student, teacher = answers()
    weight = torch.zeros(9, dtype=torch.float64)
    weight[3] = 1  # the first of the second text's two pairs
    item = sorted_l1(student.logits[3], teacher.logits[2])
    some = found(student, teacher, replace(batch(), weight=weight), weight=1.0)
    torch.testing.assert_close(some, item / 2 / 3)


def test_with_one_tokenizer_it_compares_row_by_row() -> None:
    teacher = texts.said(2, 6)
    plain = found(
        texts.said(1, 4), teacher, texts.batch(), weight=1.0, temperature=2.0, teacher_temperature=3.0
    )
    items = losses.sorted_l1(texts.said(1, 4).logits, teacher.logits, 2.0, 3.0)
    means = torch.stack([items[:3].mean(), items[3:5].mean(), items[5:].mean()])
    torch.testing.assert_close(plain, means.mean())


def test_a_teacher_of_top_tokens_is_refused() -> None:
    student, teacher = answers()
    top = replace(teacher, top=(torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 2)))
    with pytest.raises(ConfigError, match="cache_top_k to null"):
        found(student, top, batch())
