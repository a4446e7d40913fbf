"""What must be true of reading answers."""

from __future__ import annotations

import pytest

from limbeck.metrics.answers import answer_ids, last_number, words
from limbeck.metrics.fidelity import UNPARSABLE, answer_agreement


@pytest.mark.parametrize(
    ("text", "number"),
    [("She has 3 and 4.\n#### 12", "12"), ("1,250.50 dollars", "1250.5"), ("it is -7.", "-7"), ("100", "100"),
     ("x-2 or 5-3", "3"), ("none at all", None), ("-0", "0"), ("007", "7")],
)  # fmt: skip
def test_the_last_number_in_its_plainest_form(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_words_are_small_and_without_signs() -> None:
    assert words("The cat's 2 hats, THE end.") == ["the", "cat", "s", "2", "hats", "the", "end"]


def test_equal_answers_have_equal_ids_and_none_agrees_with_none() -> None:
    own, other = answer_ids([["a 3", "b", "4.0"], ["3", "c", "4"]], numbers=True)
    assert own.tolist() == other.tolist() == [0, UNPARSABLE, 1]
    assert answer_agreement(own, other) == pytest.approx(200 / 3)
    own, other = answer_ids([["The end.", "!"], ["the END", "?"]], numbers=False)
    assert own.tolist() == other.tolist() == [0, UNPARSABLE]
