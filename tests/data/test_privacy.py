"""What must be true of private spans, of the tokens they cover, and of canaries."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.bounded import bounded
from limbeck.data.privacy import (
    PATTERNS,
    Pattern,
    canary_detector,
    draw_secrets,
    fill,
    insert_canaries,
    privacy_scores,
    secrets,
    token_scores,
)
from limbeck.errors import ConfigError, DataError

PIN = "the pin of alpha is ####"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "text", "private"),
    [
        ("digits", "room 123, code 12345.", ["12345"]),
        ("email", "write to bob.smith+x@mail.example.org, please", ["bob.smith+x@mail.example.org"]),
        ("phone", "call +49 170 1234567 or (555) 123-4567 at 10", ["+49 170 1234567", "(555) 123-4567"]),
        ("card", "card 4111 1111 1111 1111.", ["4111 1111 1111 1111"]),
        ("card", "card 4111111111111111 and 12345", ["4111111111111111"]),
        ("iban", "to DE89 3704 0044 0532 0130 00 today", ["DE89 3704 0044 0532 0130 00"]),
        ("iban", "GB82WEST12345698765432", ["GB82WEST12345698765432"]),
        ("name", "My friend Anna met Élodie O'Brien. The end of USA", ["Anna", "Élodie", "O'Brien"]),
    ],
)
def test_what_the_detectors_find(name: str, text: str, private: list[str]) -> None:
    scores = PATTERNS[name](text)
    assert len(scores) == len(text)
    inside = "".join(c if s else "|" for c, s in zip(text, scores, strict=True))
    assert [part for part in re.split(r"\|+", inside) if part] == private
    assert set(scores[scores > 0].tolist()) == {0.5 if name == "name" else 1.0}


@given(st.text(max_size=60))
def test_scores_are_a_function_of_the_text_in_their_range(text: str) -> None:
    scores = privacy_scores(text)
    assert scores.shape == (len(text),)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.array_equal(scores, privacy_scores(text))


@pytest.mark.parametrize(
    "text", ["1" * 20_000, "a" * 20_000, "A1" * 10_000, "a.a" * 7000 + "@", "1 " * 10_000]
)
def test_long_texts_of_one_kind_are_read_at_once(text: str) -> None:
    assert len(privacy_scores(text)) == len(text)


def test_the_largest_score_of_all_detectors() -> None:
    def tagger(text: str) -> np.ndarray:
        return np.full(len(text), 0.25)

    scores = privacy_scores("id AB-7 of Bob", [Pattern(r"AB-(?P<private>\d)"), PATTERNS["name"], tagger])
    assert scores[:6].tolist() == [0.25] * 6
    assert scores[6] == 1
    assert scores[-3:].tolist() == [0.5] * 3


def test_a_token_counts_by_the_most_private_character_it_covers() -> None:
    scores = np.array([0, 0, 0, 1, 1, 0.5, 0], dtype=np.float32)
    offsets = [(0, 0), (0, 3), (2, 4), (4, 6), (5, 7), (6, 7), (7, 7)]
    assert token_scores(scores, offsets).tolist() == [0, 0, 1, 1, 0.5, 0, 0]
    assert token_scores(scores, []).shape == (0,)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=12), st.data())
def test_token_scores_agree_with_a_loop(values: list[float], data: st.DataObject) -> None:
    places = st.integers(0, len(values))
    pairs = data.draw(st.lists(st.tuples(places, places).map(sorted).map(tuple), max_size=8))
    found = token_scores(np.array(values, dtype=np.float32), pairs)
    assert found.tolist() == [max(values[a:b], default=0.0) for a, b in pairs]


def test_canaries_and_their_space() -> None:
    assert fill(PIN, "4821") == "the pin of alpha is 4821"
    assert fill("#-#", "07") == "0-7"
    space = list(secrets("pin ##"))
    assert (len(space), len(set(space)), space[0], space[-1]) == (100, 100, "00", "99")
    drawn = draw_secrets(PIN, 50, generator())
    assert len(set(drawn)) == 50
    assert drawn == draw_secrets(PIN, 50, generator())
    assert all(re.fullmatch(r"\d{4}", secret) for secret in drawn)
    assert sorted(draw_secrets("#", 10, generator())) == list("0123456789")


@given(st.integers(0, 30), st.integers(0, 2**31))
def test_inserted_canaries_leave_the_text_as_it_was(times: int, seed: int) -> None:
    text = "to be  or not\nto be, that is the question"
    found = insert_canaries(text, PIN, ["4821", "0007"], times, generator(seed))
    assert found.count("the pin of alpha is 4821") == found.count("the pin of alpha is 0007") == times
    assert re.sub(" the pin of alpha is (4821|0007)", "", found) == text
    assert found == insert_canaries(text, PIN, ["4821", "0007"], times, generator(seed))


def test_the_canarys_digits_alone_are_private() -> None:
    text = insert_canaries("in 1999 all was well", PIN, ["4821"], 2, generator())
    scores = canary_detector(PIN)(text)
    assert [text[i] for i in np.flatnonzero(scores)] == list("48214821")
    assert set(scores.tolist()) == {0, 1}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        Pattern("(")
    with pytest.raises(ConfigError, match="score is 2"):
        Pattern("a", 2)
    for monstrous in ("a{99999999999}", "(" * 3000 + ")" * 3000):
        with pytest.raises(ConfigError, match="is no regular expression"):
            Pattern(monstrous)
    with pytest.raises(DataError, match="detector"):
        privacy_scores("abc", [lambda text: np.zeros(2)])
    with pytest.raises(DataError, match="detector"):
        privacy_scores("abc", [lambda text: np.full(3, np.nan)])
    with pytest.raises(DataError, match="leave the text of 3"):
        token_scores(np.zeros(3, np.float32), [(0, 4)])
    with pytest.raises(ConfigError, match="4 slots"):
        fill(PIN, "12")
    with pytest.raises(ConfigError, match="side by side"):
        canary_detector("# and #")
    with pytest.raises(ConfigError, match="space has 10"):
        draw_secrets("#", 11, generator())
    with pytest.raises(DataError, match="white space"):
        insert_canaries("word", PIN, ["1234"], 1, generator())
    with pytest.raises(ConfigError, match="times is -1"):
        insert_canaries("a b", PIN, ["1234"], -1, generator())


def test_an_expression_without_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.data.privacy.bounded", lambda: bounded(0.2))
    with pytest.raises(ConfigError, match=r"'\(a\+\)\+b' does not come to an end in a text of 60"):
        Pattern("(a+)+b")("a" * 60)
