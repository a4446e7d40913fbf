"""Texts for two tokenizers at once: cut so that each row holds the same characters for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from limbeck.data.texts import Corpus, Document, Reading
from limbeck.data.tokens import Rows, encode, rows_of
from limbeck.errors import DataError


def aligned_rows(corpus: Corpus, own: Any, other: Any, reading: Reading) -> Rows:
    """The corpus in rows of the tokenizer ``own``, and of ``other``: row n holds the same text for both.

    Each text begins a row, and one that is longer than a row goes on in the next, from a white space on. The
    end token follows the last piece alone.

    Raises:
        DataError: no token counts, or a text with a prompt is longer than a row.
    """
    tokenizers = (own, other)
    documents = tuple(
        piece
        for document in corpus.documents
        for piece in halved(document, tokenizers, reading)
        if all(
            len(told) > 0 and len(asked) + len(told) > 1 for asked, told in _read(piece, tokenizers, reading)
        )
    )
    cut, apart = replace(corpus, documents=documents), replace(reading, pack=False)
    return replace(rows_of(cut, own, apart), other=rows_of(cut, other, apart))


def halved(document: Document, tokenizers: Sequence[Any], reading: Reading) -> Iterator[Document]:
    """The document in pieces of which none fills more than a row of any tokenizer; see ``aligned_rows``."""
    longest = max(len(asked) + len(told) - 1 for asked, told in _read(document, tokenizers, reading))
    if longest <= reading.length:
        yield document
        return
    if document.prompt or len(document.text) < 2:
        raise DataError(
            f"{document.prompt + document.text:.20}... has {longest} tokens but rows hold {reading.length}, "
            "and two tokenizers share no part of an answer: raise data.length"
        )
    text = document.text
    at = middle(text)
    for part, ends in ((text[:at], False), (text[at:], document.ends)):
        yield from halved(replace(document, text=part, ends=ends), tokenizers, reading)


def middle(text: str) -> int:
    """Where to cut a text: before the space nearest to its middle, or else there."""
    half = len(text) // 2
    before, after = text.rfind(" ", 1, half + 1), text.find(" ", half)
    near = [place for place in (before, after) if place > 0]
    return min(near, key=lambda place: abs(place - half), default=half)


def _read(
    document: Document, tokenizers: Sequence[Any], reading: Reading
) -> list[tuple[list[int], list[int]]]:
    return [encode(document, tokenizer, template=reading.template) for tokenizer in tokenizers]
