"""What must be true of agreement, over answers and over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import DataError, ShapeError
from limbeck.metrics import accuracy, fidelity

seeds = st.integers(0, 2**31)
counts = st.integers(1, 40)


def answers(seed: int, count: int, *, parsable: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0 if parsable else -1, 4, (count,), generator=generator)


@given(seeds, counts)
def test_agreement_of_answers(seed: int, count: int) -> None:
    student, teacher = answers(seed, count), answers(seed + 1, count)
    found = fidelity.answer_agreement(student, teacher)
    assert fidelity.answer_agreement(teacher, teacher) == 100
    assert fidelity.answer_agreement(teacher, student) == found
    names = torch.tensor([7, 3, 12, 5])  # the same answers under other names
    assert fidelity.answer_agreement(names[student], names[teacher]) == found


@given(seeds, counts)
def test_the_table_holds_the_accuracies(seed: int, count: int) -> None:
    student, teacher = (answers(seed + i, count, parsable=False) for i in (0, 1))
    gold = answers(seed + 2, count)
    table = fidelity.agreement_table(student, teacher, gold)
    assert table.sum().item() == pytest.approx(100)
    assert table[0].sum().item() == pytest.approx(accuracy.accuracy(student, gold))
    assert table[:, 0].sum().item() == pytest.approx(accuracy.accuracy(teacher, gold))
    assert fidelity.answer_agreement(student, teacher) >= table[0, 0].item() - 1e-9


@given(seeds, counts)
def test_accuracies_differ_by_no_more_than_the_answers_do(seed: int, count: int) -> None:
    student, teacher, gold = (answers(seed + i, count) for i in range(3))
    gap = abs(accuracy.accuracy(student, gold) - accuracy.accuracy(teacher, gold))
    assert gap <= 100 - fidelity.answer_agreement(student, teacher) + 1e-9


def test_unparsable_answers_never_agree() -> None:
    none = torch.full((3,), fidelity.UNPARSABLE)
    assert fidelity.answer_agreement(none, none) == 0
    assert fidelity.agreement_table(none, none, none).tolist() == [[0, 0], [0, 100]]


@given(seeds)
def test_tokens_that_do_not_count_are_left_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 5, 6, generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.6
    mask[0, 0] = True
    apart = (
        fidelity.agreement(student[mask], teacher[mask]),
        fidelity.predictive_kl(student[mask], teacher[mask]),
    )
    student[~mask], teacher[~mask] = torch.nan, torch.nan
    found = fidelity.agreement(student, teacher, mask), fidelity.predictive_kl(student, teacher, mask)
    assert found == pytest.approx(apart)
    assert fidelity.agreement(teacher, teacher, mask) == 100
    assert fidelity.predictive_kl(teacher, teacher, mask) == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_named() -> None:
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(DataError, match="0 samples"):
        fidelity.agreement(logits, logits, torch.zeros(2, 3))
    with pytest.raises(DataError, match="0 samples"):
        fidelity.answer_agreement(torch.empty(0), torch.empty(0))
    with pytest.raises(ShapeError, match="one value per token"):
        fidelity.agreement(logits, logits, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\[3\].*\[2\]"):
        fidelity.agreement_table(torch.zeros(3), torch.zeros(3), torch.zeros(2))


def test_the_first_of_both_overlap() -> None:
    teacher = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1, -2]])
    assert fidelity.top_overlap(teacher, teacher) == 100
    assert fidelity.top_overlap(-teacher, teacher) == pytest.approx(40)  # 8 classes: 5 and 5 share 2
    assert fidelity.top_overlap(-teacher, teacher, k=4) == 0
    two = torch.tensor([[1.0, 0.0]])
    assert fidelity.top_overlap(-two, two) == 0, "of two classes the first alone counts"
    both, masked = torch.cat([teacher, -teacher]), torch.tensor([True, False])
    assert fidelity.top_overlap(both, torch.cat([teacher, teacher]), mask=masked) == 100
