"""Rows that hold the same text for two tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.aligned import aligned_rows, middle
from limbeck.data.python_texts import docs
from limbeck.data.texts import Corpus, Document, Reading
from limbeck.data.tokenizers import byte_pairs, characters
from limbeck.data.tokens import UNCOUNTED, Rows
from limbeck.errors import DataError

SOME = "".join(docs()[3:6])[:4000]
LETTERS, PAIRS = characters((SOME,)), byte_pairs((SOME,), 320)


def rows(*documents: Document, length: int = 32) -> tuple[Rows, Rows]:
    corpus = Corpus("some", documents, ("all",), "", "")
    own = aligned_rows(corpus, PAIRS, LETTERS, Reading(length=length))
    assert own.other is not None
    return own, own.other


def text(tokenizer: Any, found: Rows, row: int) -> str:
    """What a row's text is: what is read, and the last token to be said."""
    said = found.following[row]
    count = int((said != UNCOUNTED).sum())
    ids = [*found.ids[row, :count].tolist(), int(said[count - 1])]
    return str(tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id]))


def test_row_by_row_both_hold_the_same_text_and_together_all_of_it() -> None:
    own, other = rows(Document(SOME))
    assert len(own) == len(other) > 50
    texts = [text(PAIRS, own, row) for row in range(len(own))]
    assert texts == [text(LETTERS, other, row) for row in range(len(own))]
    assert "".join(texts) == SOME


def test_the_end_follows_the_last_piece_alone() -> None:
    own, other = rows(Document(SOME[:500]), Document(SOME[500:900]))
    for tokenizer, found in ((PAIRS, own), (LETTERS, other)):
        assert int((found.following == tokenizer.eos_token_id).sum()) == 2


def test_texts_with_prompts_stay_whole() -> None:
    own, other = rows(Document(" in the", prompt="what is"), Document(" of", prompt="the names"))
    assert len(own) == len(other) == 2
    with pytest.raises(DataError, match=r"raise data\.length"):
        rows(Document(SOME[:60], prompt="what is"))


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=sorted(set(SOME)), min_size=2, max_size=200))
def test_any_text_is_cut_into_what_both_can_read(given_text: str) -> None:
    try:
        own, other = rows(Document(given_text), length=16)
    except DataError:
        return
    assert len(own) == len(other)
    assert own.ids.shape[1] <= 16


def test_the_middle_is_at_a_space() -> None:
    assert middle("aaaa bbbb") == 4
    assert middle("aa bbbbbbbb") == 2
    assert middle("abcdef") == 3
