"""Texts: what every language data set gives, before anything of it is a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from limbeck.data.privacy import Pattern, pattern
from limbeck.errors import ConfigError, DataError

FEW = 20  # documents of a domain up to which each of them is cut


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: what a model learns to write.
        prompt: what stands before it; it is read, but none of it counts.
        domain: which of the corpus' domains it is of.
        ends: whether the end token follows; a piece of a longer text does not end.
    """

    text: str
    prompt: str = ""
    domain: int = 0
    ends: bool = True


@dataclass(frozen=True)
class Corpus:
    """Documents of one or more domains; checked when made.

    Attributes:
        name: how figures on it are labelled; a subset says so in its name.
        documents: in order.
        domains: their names.
        licence: as the source states it.
        source: where the texts come from.
        facts: what else is known of it, as plain data: planted secrets, for example.

    Raises:
        DataError: no document that is not empty, or one of a domain that is not named.
    """

    name: str
    documents: tuple[Document, ...]
    domains: tuple[str, ...]
    licence: str
    source: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(document.text for document in self.documents):
            raise DataError(f"{self.name}: no text in it: check the files and the fields that are read")
        strays = [d.domain for d in self.documents if not 0 <= d.domain < len(self.domains)]
        if strays:
            raise DataError(f"{self.name}: domain {strays[0]} is not in 0..{len(self.domains) - 1}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all documents: 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.domains).encode())
        for document in self.documents:
            digest.update(repr((document.text, document.prompt, document.domain, document.ends)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TextSplits:
    """The parts of one language data set: of the same domains in the same order.

    Raises:
        DataError: the parts name different domains.
    """

    train: Corpus
    validation: Corpus
    test: Corpus

    def __post_init__(self) -> None:
        for part in (self.validation, self.test):
            if part.domains != self.train.domains:
                raise DataError(
                    f"{self.train.name} has the domains {', '.join(self.train.domains)} but {part.name} "
                    f"{', '.join(part.domains)}: all parts need the same ones"
                )

    @property
    def name(self) -> str:
        """The name of the data set: that of the train split without the word "train"."""
        return self.train.name.removesuffix(" train")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How texts become rows of tokens: what every language data set can be told.

    Attributes:
        tokenizer: ``characters`` or ``bpe:N``, made from the training texts; a name on the Hugging Face hub,
            a local folder or a ``.gguf`` file; None = the student's, or else the teacher's.
        length: T, tokens of a row.
        pack: documents stand behind one another in a row, none reading another; else each begins a row.
        template: whether prompts and answers are put into the tokenizer's chat template.
        private: what finds private characters: keys of ``privacy.PATTERNS``, or regular expressions behind
            ``re:``. Each token to be said then carries how private it is, as the mark ``privacy``.

    Raises:
        ConfigError: a length below 2, or no such pattern.
    """

    tokenizer: str | None = None
    length: int = 128
    pack: bool = True
    template: bool = False
    private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ConfigError(f"length is {self.length}: allowed are values of at least 2")
        self.detectors()

    @property
    def reading(self) -> Reading:
        """How the texts are read; a data set that wraps another one has that one's."""
        return self

    def detectors(self) -> tuple[Pattern, ...]:
        """What ``private`` names."""
        return tuple(pattern(name) for name in self.private)


def three(
    name: str, documents: Sequence[Document], domains: Sequence[str], licence: str, source: str,
    shares: tuple[float, float], *, validation: Sequence[Document] | None = None,
    test: Sequence[Document] | None = None,
) -> TextSplits:  # fmt: skip
    """Training, validation and test part of texts.

    A part that is not given is cut from ``documents``: the last of each domain are for the test, those before
    them for validation. Where a domain has few, and no prompts, each of them is cut.

    Args:
        shares: of validation and test, each above 0, where they are cut.
        validation: the validation part, where the texts have one of their own.
        test: the test part, likewise.

    Raises:
        ConfigError: shares that leave nothing to learn from.
        DataError: a domain is too small to be in all parts.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise ConfigError(f"validation and test are {shares}: allowed are shares above 0, below 1 together")
    wanted = [0.0 if given else share for given, share in zip((validation, test), shares, strict=True)]
    parts: list[list[Document]] = [[], list(validation or ()), list(test or ())]
    for number, domain in enumerate(domains):
        own = [d for d in documents if d.domain == number and d.text]
        few = any(wanted) and len(own) < FEW and not any(d.prompt for d in own)
        found = _within(own, wanted) if few else _by_document(own, wanted)
        if not all(found[place] for place, share in enumerate((1.0, *wanted)) if share):
            raise DataError(f"{name}: too little text of domain {domain!r} for its parts: give it more")
        for part, more in zip(parts, found, strict=True):
            part.extend(more)
    return TextSplits(
        *(
            Corpus(f"{name} {part}", tuple(own), tuple(domains), licence, source)
            for part, own in zip(("train", "validation", "test"), parts, strict=True)
        )
    )


def _by_document(own: Sequence[Document], shares: Sequence[float]) -> list[Sequence[Document]]:
    watched, tested = (max(1, round(share * len(own))) if share else 0 for share in shares)
    ends = (0, len(own) - watched - tested, len(own) - tested, len(own))
    return [own[max(a, 0) : max(b, 0)] for a, b in pairwise(ends)]


def _within(own: Sequence[Document], shares: Sequence[float]) -> list[Sequence[Document]]:
    pieces = [cut(document, shares) for document in own]
    return [[piece for each in pieces if (piece := each[place]).text] for place in range(3)]


def cut(document: Document, shares: Sequence[float]) -> list[Document]:
    """A document as three, parted at ends of lines where there are some; the last alone ends as it does."""
    text = document.text
    places = [0]
    for share in (sum(shares), shares[1]):
        wanted = round(len(text) * (1 - share))
        line = text.rfind("\n", places[-1], wanted) + 1
        places.append(line if share and line > places[-1] else wanted)
    return [
        replace(document, text=text[a:b], ends=document.ends and b == len(text))
        for a, b in pairwise((*places, len(text)))
    ]
