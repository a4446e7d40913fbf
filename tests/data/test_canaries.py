"""Planted secrets, and the marks of private tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck import config
from limbeck.data.canaries import Canaries, planted
from limbeck.data.digits import Digits
from limbeck.data.python_texts import PythonTexts
from limbeck.data.texts import Corpus, Document
from limbeck.data.tokenizers import byte_pairs, characters
from limbeck.data.tokens import PRIVACY, UNCOUNTED, Rows, TokenBatches, rows_of
from limbeck.errors import ConfigError, DataError

FORMATS = ("the pin of alpha is ####", "room ## is hers")
TEXTS = PythonTexts(domains=("sums", "names"), shares=(1.0, 0.05), length=32)
TEXT = "call the desk, the pin of alpha is 4821 and nothing else; there were 12 of us in 1999"


def read(document: Document, tokenizer: Any, **fields: Any) -> Rows:
    corpus = Corpus("one", (document,), ("all",), "", "")
    return rows_of(corpus, tokenizer, replace(TEXTS, **fields))


def private(rows: Rows, tokenizer: Any) -> str:
    """What the marks say is private, of all that is to be said."""
    told = [
        (token, mark)
        for token, mark in zip(rows.following.flatten(), rows.marks[PRIVACY].flatten(), strict=True)
    ]
    return "".join(
        tokenizer.decode([token]) if mark == 1 else "_" for token, mark in told if token != UNCOUNTED
    )


def test_canaries_stand_in_the_training_part_alone_as_often_as_asked() -> None:
    plain, splits = TEXTS.load(), Canaries(data=TEXTS, formats=FORMATS, times=7).seeded(3).load()
    known = splits.train.facts["canaries"]
    assert [each["format"] for each in known] == list(FORMATS)
    whole = " ".join(document.text for document in splits.train.documents)
    for each in known:
        secret = each["secret"]
        text = each["format"].replace("#" * len(secret), secret)
        assert whole.count(text) >= 6  # another canary may have been put within one
        assert each["times"] == 7
    assert splits.validation == plain.validation
    assert splits.test == plain.test
    assert splits.train.name == "Python's sums and names with canaries train"


def test_the_seed_draws_secrets_and_places_unless_they_are_given() -> None:
    def secrets(run: int, **fields: Any) -> list[str]:
        train = Canaries(data=TEXTS, formats=FORMATS, **fields).seeded(run).load().train
        return [each["secret"] for each in train.facts["canaries"]]

    assert secrets(1) == secrets(1)
    assert secrets(1) != secrets(2)
    assert secrets(1, seed=5) == secrets(2, seed=5)
    assert secrets(1, secrets=("4821", "17")) == ["4821", "17"]


def test_longer_texts_get_more_of_them() -> None:
    documents = (Document("a b " * 2000), Document("c d " * 20), Document("nothing"))
    corpus = Corpus("some", documents, ("all",), "", "")
    found = planted(corpus, ("pin ##",), ("42",), 50, torch.Generator().manual_seed(0))
    counts = [document.text.count("pin 42") for document in found.documents]
    assert sum(counts) == 50
    assert counts[0] > 45
    assert counts[2] == 0
    with pytest.raises(DataError, match="no text with words"):
        planted(replace(corpus, documents=documents[2:]), ("#",), ("4",), 1, torch.Generator())


def test_secrets_are_marked_where_they_are_to_be_said() -> None:
    tokenizer = characters((TEXT,))
    reading = Canaries(data=TEXTS, formats=FORMATS).reading
    rows = rows_of(Corpus("one", (Document(TEXT),), ("all",), "", ""), tokenizer, reading)
    assert private(rows, tokenizer).strip("_") == "4821"
    place = int((rows.marks[PRIVACY].flatten() == 1).nonzero()[0])
    assert tokenizer.decode(rows.ids.flatten()[place : place + 1]) == " "  # what stands before the secret
    assert not Canaries(data=TEXTS, formats=FORMATS, marked=False).reading.private


def test_the_marks_are_what_the_detectors_find() -> None:
    tokenizer = characters((TEXT,))
    digits = read(Document(TEXT), tokenizer, private=("digits",))
    assert private(digits, tokenizer).replace("_", "") == "48211999"
    own = read(Document(TEXT), tokenizer, private=(r"re:\d\d of us",))
    assert private(own, tokenizer).replace("_", "") == "12 of us"
    half = read(Document("we met Alice there"), characters(("we met Alice there",)), private=("name",))
    assert sorted(set(half.marks[PRIVACY].flatten().tolist())) == [0, 0.5]
    assert not read(Document(TEXT), tokenizer).marks


def test_a_token_that_covers_part_of_a_secret_is_private_and_none_of_a_prompt() -> None:
    tokenizer = byte_pairs((TEXT * 20,), 300)
    text = read(Document(TEXT), tokenizer, private=(r"re:482",))
    assert set("482") <= set(private(text, tokenizer))
    asked = read(Document("nothing to hide", prompt=TEXT), tokenizer, private=("digits",), length=128)
    assert not asked.marks[PRIVACY].any()


def test_batches_carry_the_marks_of_what_counts() -> None:
    documents = tuple(Document(text, prompt="and?") for text in (TEXT, "in 1999", "never"))
    corpus = Corpus("some", documents, ("all",), "", "")
    tokenizer = characters((TEXT, "and?", "never"))
    rows = rows_of(corpus, tokenizer, replace(TEXTS, private=("digits",), pack=False))
    for batch in TokenBatches(rows, batch_size=2, seed=1).epoch(0):
        marks = batch.marks[PRIVACY]
        assert marks.shape == batch.labels.shape
        said = [tokenizer.decode([label]) for label in batch.labels]
        assert all(
            character.isdigit() == (mark == 1)
            for character, mark in zip(said, marks, strict=True)
            if character not in "12"
        )
    joined = rows.joined(rows)
    assert joined.marks[PRIVACY].equal(torch.cat([rows.marks[PRIVACY]] * 2))


def test_a_recipe_holds_it() -> None:
    given = {"data": {"name": "python_texts", "length": 32}, "formats": ["pin ##"], "secrets": ["42"]}
    found = config.make(Canaries, given, "data")
    assert found.reading.length == 32
    assert found.reading.private == (r"re:pin\ (?P<private>\d{2})",)
    assert (
        config.make(
            Canaries, {k: v for k, v in config.plain_value(found, "data").items() if k != "name"}, "data"
        )
        == found
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": Digits()}, "holds no texts"),
        ({"formats": ()}, "formats is empty"),
        ({"formats": ("no slot",)}, "do not lie side by side"),
        ({"formats": ("# and #",)}, "do not lie side by side"),
        ({"secrets": ("4821",)}, "secrets names 1 but formats 3"),
        ({"secrets": ("1", "2", "3")}, "4 slots"),
        ({"times": 0}, "times is 0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Canaries(**({"data": TEXTS} | fields))


def test_an_unknown_detector_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        PythonTexts(private=("digit",))
    with pytest.raises(ConfigError, match="no regular expression"):
        PythonTexts(private=("re:(",))
