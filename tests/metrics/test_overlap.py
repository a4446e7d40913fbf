"""BLEU and ROUGE-L against counts made by hand, and what must be true of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import DataError, ShapeError
from limbeck.metrics.overlap import common_subsequence, corpus_bleu, rouge_l, sentence_bleu

texts = st.lists(st.integers(0, 3), max_size=12)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=12), min_size=1, max_size=4))
def test_a_text_that_is_its_reference(same: list[list[int]]) -> None:
    assert corpus_bleu(same, same) == pytest.approx(1)
    assert sentence_bleu(same[0], same[0]) == pytest.approx(1)
    assert rouge_l(same, same) == 1


def test_bleu_by_hand() -> None:
    own, other = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "the", "big", "mat"]
    # 1-grams 5 of 6, 2-grams 2 of 5 (the cat, on the); one word short
    assert corpus_bleu([own], [other], 2) == pytest.approx(math.sqrt(5 / 6 * 2 / 5) * math.exp(1 - 7 / 6))
    assert corpus_bleu([own], [other]) == 0  # no 3-gram matches
    smooth = (5 / 6 * 3 / 6 * 1 / 5 * 1 / 4) ** 0.25 * math.exp(1 - 7 / 6)
    assert sentence_bleu(own, other) == pytest.approx(smooth)
    assert corpus_bleu([["a"] * 4], [["a", "b"]], 1) == 0.25  # a match counts as often as it stands there


def test_the_corpus_pools_its_counts() -> None:
    own, other = [[1, 2, 3], [1, 1]], [[1, 2, 4], [1, 2]]
    assert corpus_bleu(own, other, 2) == pytest.approx(math.sqrt(3 / 5 * 1 / 3))


def test_bleu_is_not_symmetric() -> None:
    assert corpus_bleu([[1, 2, 3]], [[1, 2]], 1) != corpus_bleu([[1, 2]], [[1, 2, 3]], 1)


@given(texts, texts, st.integers(1, 4))
def test_scores_lie_in_their_range(one: list[int], other: list[int], n_max: int) -> None:
    for score in (
        corpus_bleu([one], [other], n_max),
        sentence_bleu(one, other, n_max),
        rouge_l([one], [other]),
    ):
        assert 0 <= score <= 1 + 1e-12
    assert rouge_l([one], [other]) == rouge_l([other], [one])
    if not set(one) & set(other):
        assert sentence_bleu(one, other) == rouge_l([one], [other]) == 0


@given(texts, texts)
def test_subsequence_agrees_with_the_table(one: list[int], other: list[int]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(one, other) == table[-1][-1]


def test_rouge_by_hand() -> None:
    own, other = ["police", "killed", "the", "gunman"], ["the", "gunman", "police", "killed"]
    assert rouge_l([own], [other]) == pytest.approx(0.5)
    assert rouge_l([own, []], [other, []]) == pytest.approx(0.25)


def test_texts_come_in_pairs() -> None:
    with pytest.raises(ShapeError, match="1 candidates but 2 references"):
        corpus_bleu([[1]], [[1], [2]])
    with pytest.raises(DataError, match="0 texts"):
        rouge_l([], [])
