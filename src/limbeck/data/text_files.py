"""Plain text files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from limbeck.data.images import Dataset
from limbeck.data.packed import content
from limbeck.data.roots import find, roots
from limbeck.data.texts import Document, Reading, TextSplits, three
from limbeck.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class TextFiles(Reading, Dataset):
    """Plain text in UTF-8, one domain a file; ``.gz`` is unpacked.

    Attributes:
        tokenizer: see ``Reading``.
        length: T, tokens of a row.
        pack: documents stand behind one another in a row, none reading another; else each begins a row.
        template: whether prompts and answers are put into the tokenizer's chat template.
        private: what finds private characters; see ``Reading``.
        files: paths, or names in a data folder (``root``, or the environment's ``LIMBECK_DATA``).
        test_files: files of the test part, one per file, of the same domains; None = the end of each file.
        validation: share of each file that is for validation.
        test: share that is for the test, where there are no test files.
        separator: what parts documents; None = a file is one document.
        characters: read no more than so many of each file; None = all.
        root: a folder to look in.

    Raises:
        ConfigError: no file, one that is named twice, or test files that do not pair with them.
    """

    files: tuple[str, ...]
    test_files: tuple[str, ...] | None = None
    validation: float = 0.05
    test: float = 0.1
    separator: str | None = None
    characters: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ConfigError("files is empty: name at least one text file")
        if len(set(self.files)) < len(self.files):
            raise ConfigError("files names one file twice: name each once, a file is a domain")
        if self.test_files is not None and len(self.test_files) != len(self.files):
            raise ConfigError(
                f"test_files names {len(self.test_files)} but files {len(self.files)}: pair them"
            )
        if self.characters is not None and self.characters < 1:
            raise ConfigError(f"characters is {self.characters}: allowed are values of at least 1")

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts; see ``texts.three``."""
        domains, source = domain_names(self.files), ", ".join(self.files)
        return three(
            ", ".join(domains), self._read(self.files), domains, "not stated", source,
            (self.validation, self.test), test=self._read(self.test_files or ()),
        )  # fmt: skip

    def _read(self, names: tuple[str, ...]) -> list[Document]:
        found = []
        for number, name in enumerate(names):
            text = read(locate(name, self.root))[: self.characters]
            pieces = text.split(self.separator) if self.separator else [text]
            found += [Document(piece, domain=number) for piece in pieces if piece.strip()]
        return found


def domain_names(files: tuple[str, ...]) -> tuple[str, ...]:
    """What files are called without their folders and endings; where two are called alike, with them."""
    short = tuple(Path(name).name.partition(".")[0] for name in files)
    return short if len(set(short)) == len(short) else files


def locate(name: str, root: str | None) -> Path:
    """The file of that path or name.

    Raises:
        DataError: it is nowhere.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    found = find(roots(root), [name])
    if found is None:
        raise DataError(
            f"text file {name!r} is not there: give its path, or set data.root or LIMBECK_DATA to its folder"
        )
    return found


def read(path: Path) -> str:
    """A text in UTF-8, unpacked where the name ends in ``.gz``.

    Raises:
        DataError: it cannot be read, or is no such text.
    """
    try:
        return content(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable UTF-8 text ({error}): mend it or name another") from error
