"""Real texts of four kinds that every Python brings along."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from limbeck.data.images import Dataset
from limbeck.data.texts import Document, Reading, TextSplits, three
from limbeck.errors import ConfigError, DataError, unknown

MODULES = (
    "argparse", "ast", "asyncio.base_events", "calendar", "configparser", "datetime", "doctest", "inspect",
    "logging", "pickle", "statistics", "subprocess", "tarfile", "typing",
)  # fmt: skip


def docs() -> list[str]:
    """The language reference, topic by topic: 0.5 million characters of English."""
    from pydoc_data.topics import topics

    return [str(topics[name]).strip() + "\n" for name in sorted(topics)]


def code() -> list[str]:
    """The source of some modules of the standard library: a million characters."""
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise DataError(f"data.domains names code, but this Python has no source of module {name}")
        found.append(Path(spec.origin).read_text(encoding="utf-8"))
    return found


def names() -> list[str]:
    """Unicode's names of letters, line by line: 0.3 million characters of capitals."""
    found = [unicodedata.name(chr(place), "") for place in range(0x2100, 0x5000)]
    found += [unicodedata.name(chr(place), "") for place in range(0x80, 0x2100)]
    lines = [name for name in found if name and "CJK UNIFIED" not in name]
    return ["\n".join(lines[start : start + 100]) + "\n" for start in range(0, len(lines), 100)]


def sums() -> list[str]:
    """Products of two numbers up to 60, line by line: 50,000 characters."""
    return ["".join(f"{a} x {b} = {a * b}\n" for b in range(1, 61)) for a in range(1, 61)]


SOURCES: dict[str, Callable[[], list[str]]] = {"docs": docs, "code": code, "names": names, "sums": sums}


@dataclass(frozen=True, kw_only=True)
class PythonTexts(Reading, Dataset):
    """Texts that come with Python itself: language reference, source code, letters' names, products.

    They differ a little from one version of Python to the next.

    Attributes:
        tokenizer: see ``Reading``; by default characters.
        length: T, tokens of a row.
        pack: documents stand behind one another in a row, none reading another; else each begins a row.
        template: whether prompts and answers are put into the tokenizer's chat template.
        private: what finds private characters; see ``Reading``.
        domains: which of ``docs``, ``code``, ``names`` and ``sums``.
        shares: part of each domain's characters that is taken, by domain; None = all of all.
        validation: share of the documents that is for validation.
        test: share that is for the test.

    Raises:
        ConfigError: a domain that is not there, or shares that are not in (0, 1].
    """

    tokenizer: str | None = "characters"
    domains: tuple[str, ...] = ("docs",)
    shares: tuple[float, ...] | None = None
    validation: float = 0.05
    test: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.domains:
            if name not in SOURCES:
                raise unknown("domain", name, SOURCES)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ConfigError(
                f"domains is {list(self.domains)}: name some of {', '.join(SOURCES)}, each once"
            )
        if self.shares is not None and (
            len(self.shares) != len(self.domains) or not all(0 < share <= 1 for share in self.shares)
        ):
            raise ConfigError(f"shares is {list(self.shares)}: give each domain one above 0 and at most 1")

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts; see ``texts.three``."""
        documents = [
            Document(text, domain=number)
            for number, (name, share) in enumerate(
                zip(self.domains, self.shares or repeat(1.0), strict=False)
            )
            for text in beginning(SOURCES[name](), share)
        ]
        return three(
            f"Python's {' and '.join(self.domains)}", documents, self.domains, "PSF-2.0",
            "the standard library of this Python", (self.validation, self.test),
        )  # fmt: skip


def beginning(texts: list[str], share: float) -> list[str]:
    """The first texts, as many as hold ``share`` of all characters, the last of them cut."""
    left = round(share * sum(map(len, texts)))
    found = []
    for text in texts:
        found.append(text[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    return found
