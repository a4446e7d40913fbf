from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.python_texts import SOURCES, PythonTexts, beginning
from limbeck.data.texts import FEW, Corpus, Document, Reading, TextSplits, cut, three
from limbeck.errors import ConfigError, DataError


def corpus(*texts: str, domains: tuple[str, ...] = ("all",)) -> Corpus:
    return Corpus("made up train", tuple(map(Document, texts)), domains, "none", "here")


def parts(
    documents: list[Document], domains: tuple[str, ...] = ("all",), **given_parts: list[Document]
) -> TextSplits:
    return three("made up", documents, domains, "none", "here", (0.1, 0.2), **given_parts)


def test_a_corpus_says_what_is_wrong_with_it() -> None:
    with pytest.raises(DataError, match="made up train: no text in it"):
        corpus("", "")
    with pytest.raises(DataError, match=r"domain 1 is not in 0\.\.0"):
        Corpus("x", (Document("a", domain=1),), ("all",), "", "")
    with pytest.raises(DataError, match="made up train has the domains all but x test other"):
        TextSplits(corpus("a"), corpus("a"), Corpus("x test", (Document("a"),), ("other",), "", ""))


def test_the_fingerprint_is_of_all_that_is_learnt() -> None:
    same = corpus("ab", "c").fingerprint
    assert same == corpus("ab", "c").fingerprint
    others = [corpus("a", "bc"), corpus("ab", "c", domains=("x",))]
    others += [
        Corpus("x", (Document("ab", p, 0, e), Document("c")), ("all",), "", "")
        for p, e in (("", False), ("p", True))
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 5


def test_many_documents_stay_whole() -> None:
    documents = [Document(f"text {n}", domain=n % 2) for n in range(2 * FEW)]
    splits = parts(documents, ("even", "odd"))
    found = [splits.train.documents, splits.validation.documents, splits.test.documents]
    assert [len(part) for part in found] == [28, 4, 8]
    assert sorted(d.text for part in found for d in part) == sorted(d.text for d in documents)
    assert {d.domain for d in splits.test.documents} == {0, 1}
    assert splits.test.documents[-1] == documents[-1]
    assert splits.name == "made up"


@given(st.text(min_size=30, max_size=300), st.integers(1, 3))
def test_few_documents_are_cut_and_nothing_is_lost(text: str, count: int) -> None:
    splits = parts([Document(text)] * count)
    found = [splits.train.documents, splits.validation.documents, splits.test.documents]
    assert all(found)
    assert "".join(part[0].text for part in found) == text
    assert [part[0].ends for part in found] == [False, False, True]


def test_a_document_is_cut_between_lines() -> None:
    first, second, third = cut(Document("one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n"), (0.2, 0.2))
    assert first.text.endswith("\n") and second.text.endswith("\n")
    assert third.text.startswith("seven")


def test_a_part_that_is_given_is_not_cut() -> None:
    documents, own = [Document(f"text {n}") for n in range(3)], [Document("mine")]
    assert parts(documents, validation=own, test=own).train.documents == tuple(documents)
    splits = parts(documents, test=own)
    assert splits.test.documents == tuple(own)
    assert "".join(
        splits.train.documents[n].text + splits.validation.documents[n].text for n in range(3)
    ) == "".join(d.text for d in documents)


def test_parts_that_cannot_be_had() -> None:
    with pytest.raises(DataError, match="too little text of domain 'b' for its parts"):
        parts([Document("long enough for all the parts"), Document("x", domain=1)], ("a", "b"))
    with pytest.raises(DataError, match="too little text of domain 'all'"):
        parts([Document("answer", "question")] * 2)
    for shares in ((0.0, 0.1), (0.5, 0.5)):
        with pytest.raises(ConfigError, match="validation and test are"):
            three("x", [Document("a")], ("all",), "", "", shares)


def test_how_texts_are_read_is_checked() -> None:
    with pytest.raises(ConfigError, match="length is 1: allowed are values of at least 2"):
        Reading(length=1)
    with pytest.raises(ConfigError, match=r"unknown pattern 'fone'.*did you mean 'phone'"):
        Reading(private=("fone",))


# The texts that come with Python


@pytest.mark.parametrize("domain", SOURCES)
def test_python_brings_texts_of_each_kind(domain: str) -> None:
    splits = PythonTexts(domains=(domain,)).load()
    sizes = [
        sum(len(d.text) for d in part.documents) for part in (splits.train, splits.validation, splits.test)
    ]
    assert sizes[0] > 4 * sizes[2] and min(sizes) > 1000
    assert splits.train.fingerprint == PythonTexts(domains=(domain,)).load().train.fingerprint
    train = {d.text for d in splits.train.documents}
    assert not train & {d.text for d in splits.test.documents}


def test_shares_of_pythons_texts() -> None:
    splits = PythonTexts(domains=("sums", "names"), shares=(0.5, 0.1)).load()
    whole = {name: sum(map(len, SOURCES[name]())) for name in ("sums", "names")}
    for number, (name, share) in enumerate((("sums", 0.5), ("names", 0.1))):
        own = [d for part in (splits.train, splits.validation, splits.test) for d in part.documents]
        taken = sum(len(d.text) for d in own if d.domain == number)
        assert taken == pytest.approx(share * whole[name], abs=2)
    assert beginning(["abc", "def"], 0.5) == ["abc"]
    assert beginning(["abc", "def"], 0.6) == ["abc", "d"]


def test_pythons_texts_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"unknown domain 'docks'.*did you mean 'docs'"):
        PythonTexts(domains=("docks",))
    with pytest.raises(ConfigError, match="name some of docs, code, names, sums, each once"):
        PythonTexts(domains=("docs", "docs"))
    for shares in ((0.5,), (0.0, 1.0), (1.0, 1.5)):
        with pytest.raises(ConfigError, match="give each domain one above 0 and at most 1"):
            PythonTexts(domains=("docs", "sums"), shares=shares)
