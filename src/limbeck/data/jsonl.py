"""Texts, or prompts with answers, in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limbeck.data.images import Dataset
from limbeck.data.text_files import domain, locate, read
from limbeck.data.texts import Corpus, Document, Reading, TextSplits, three
from limbeck.errors import ConfigError, DataError


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
        split: field that says ``train``, ``validation`` or ``test``; None = parts are cut by share.
        validation: share of each file's training lines that is for validation.
        test: share that is for the test, where no field says it.
        limit: read no more than so many lines of each file and part; None = all.
        root: a folder to look in.

    Raises:
        ConfigError: no file.
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

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts: as the lines say, or see ``texts.three``."""
        domains = tuple(domain(name) for name in self.files)
        name, source = ", ".join(domains), ", ".join(self.files)
        found = [pair for number, file in enumerate(self.files) for pair in self._lines(file, number)]
        if self.split is None:
            documents = [document for _, document in found]
            return three(name, documents, domains, "not stated", source, (self.validation, self.test))
        parts = {
            part: [document for where, document in found if where == part]
            for part in ("train", "validation", "test")
        }
        if not parts["validation"]:
            share = max(1, round(self.validation * len(parts["train"])))
            parts["train"], parts["validation"] = parts["train"][:-share], parts["train"][-share:]
        return TextSplits(
            *(
                Corpus(f"{name} {part}", tuple(own), domains, "not stated", source)
                for part, own in parts.items()
            )
        )

    def _lines(self, file: str, number: int) -> Iterator[tuple[str, Document]]:
        counts: dict[str, int] = {}
        for place, line in enumerate(read(locate(file, self.root)).splitlines(), 1):
            if not line.strip():
                continue
            entry = self._entry(line, f"{file}, line {place}")
            where = "train" if self.split is None else self._value(entry, self.split, f"{file}, line {place}")
            counts[where] = counts.get(where, 0) + 1
            if self.limit is not None and counts[where] > self.limit:
                continue
            asked = "" if self.prompt is None else self._value(entry, self.prompt, f"{file}, line {place}")
            yield where, Document(self._value(entry, self.text, f"{file}, line {place}"), asked, number)

    def _entry(self, line: str, where: str) -> dict[str, Any]:
        try:
            entry = json.loads(line)
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
