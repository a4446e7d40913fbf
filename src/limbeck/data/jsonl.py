"""Texts, or prompts with answers, in JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limbeck.data.images import Dataset
from limbeck.data.text_files import domain_names, locate, read
from limbeck.data.texts import Document, Reading, TextSplits, three
from limbeck.errors import ConfigError, DataError
from limbeck.plain import from_json

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class JsonLines(Reading, Dataset):
    """One JSON object a line, one domain a file; ``.gz`` is unpacked.

    Attributes:
        tokenizer: see ``Reading``.
        length: T, tokens of a row.
        pack: documents stand behind one another in a row, none reading another; else each begins a row.
        template: whether prompts and answers are put into the tokenizer's chat template.
        private: what finds private characters; see ``Reading``.
        files: paths, or names in a data folder (``root``, or the environment's ``LIMBECK_DATA``).
        text: field of what is learnt: the answer, or the whole text.
        prompt: field of what stands before it; None = there is nothing.
        split: field that says ``train``, ``validation`` or ``test``; a part that no line is of is cut from
            the training lines. None = both are.
        validation: share of each file's training lines that is for validation, where it is cut.
        test: share that is for the test, where it is cut.
        limit: read no more than so many lines of each file and part; None = all.
        root: a folder to look in.

    Raises:
        ConfigError: no file, or one that is named twice.
    """

    files: tuple[str, ...]
    text: str = "text"
    prompt: str | None = None
    split: str | None = None
    validation: float = 0.05
    test: float = 0.1
    limit: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ConfigError("files is empty: name at least one file of JSON lines")
        if len(set(self.files)) < len(self.files):
            raise ConfigError("files names one file twice: name each once, a file is a domain")

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts: as the lines say, or see ``texts.three``."""
        domains, source = domain_names(self.files), ", ".join(self.files)
        parts: dict[str, list[Document]] = {part: [] for part in PARTS}
        for number, file in enumerate(self.files):
            for part, document in self._lines(file, number):
                parts[part].append(document)
        return three(
            ", ".join(domains), parts["train"], domains, "not stated", source, (self.validation, self.test),
            validation=parts["validation"], test=parts["test"],
        )  # fmt: skip

    def _lines(self, file: str, number: int) -> Iterator[tuple[str, Document]]:
        counts: dict[str, int] = {}
        for place, line in enumerate(read(locate(file, self.root)).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{file}, line {place}"
            entry = self._entry(line, where)
            part = "train" if self.split is None else self._value(entry, self.split, where)
            if part not in PARTS:
                raise DataError(f"{where}: {self.split} is {part!r}: allowed are {', '.join(PARTS)}")
            counts[part] = counts.get(part, 0) + 1
            if self.limit is None or counts[part] <= self.limit:
                asked = "" if self.prompt is None else self._value(entry, self.prompt, where)
                yield part, Document(self._value(entry, self.text, where), asked, number)

    def _entry(self, line: str, where: str) -> dict[str, Any]:
        try:
            entry = from_json(line)
        except ValueError as error:
            raise DataError(f"{where}: no JSON ({error}): mend the line") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where}: a {type(entry).__name__}, but each line must be an object")
        return entry

    def _value(self, entry: dict[str, Any], field: str, where: str) -> str:
        value = entry.get(field)
        if not isinstance(value, str):
            have = ", ".join(entry) or "nothing"
            raise DataError(f"{where}: field {field!r} holds no text: the line has {have}")
        return value
