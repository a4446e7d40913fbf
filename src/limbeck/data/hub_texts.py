"""Any data set of texts of the Hugging Face hub, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from limbeck.data.huggingface import load_dataset
from limbeck.data.images import Dataset
from limbeck.data.texts import Document, Reading, TextSplits, three
from limbeck.errors import DataError, unknown


@dataclass(frozen=True, kw_only=True)
class HubTexts(Reading, Dataset):
    """Texts, or prompts with answers, read with the library ``datasets`` from the hub or a local copy.

    Attributes:
        tokenizer: see ``Reading``.
        length: T, tokens of a row.
        pack: documents stand behind one another in a row, none reading another; else each begins a row.
        template: whether prompts and answers are put into the tokenizer's chat template.
        private: what finds private characters; see ``Reading``.
        path: name on the hub, for example ``openai/gsm8k``, or a local folder.
        config: name of the configuration, where the data set has several.
        text: column of what is learnt: the answer, or the whole text.
        prompt: column of what stands before it; None = there is nothing.
        train: name of the train split.
        validation_split: name of the validation split; None = cut from the train split.
        test_split: name of the test split; None = cut from the train split.
        validation: share of the train split that is for validation, where it is cut.
        test: share that is for the test, where it is cut.
        limit: read no more than so many rows of each split; None = all.
    """

    path: str
    config: str | None = None
    text: str = "text"
    prompt: str | None = None
    train: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = "test"
    validation: float = 0.05
    test: float = 0.1
    limit: int | None = None

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts: the data set's own, or see ``texts.three``."""
        parts = load_dataset(self.path, self.config)
        licence = parts[next(iter(parts))].info.license or "not stated"
        train, validation, test = (
            self._documents(parts, getattr(self, field), field)
            for field in ("train", "validation_split", "test_split")
        )
        return three(
            self.path, train, (self.path,), licence, f"huggingface.co/datasets/{self.path}",
            (self.validation, self.test), validation=validation, test=test,
        )  # fmt: skip

    def _documents(self, parts: Any, split: str | None, field: str) -> list[Document]:
        if split is None:
            return []
        if split not in parts:
            raise unknown("split", split, parts, where=f"data.{field}")
        table = parts[split]
        for column in (self.text, self.prompt):
            if column is not None and column not in table.column_names:
                raise unknown("column", column, table.column_names, where="data")
        few = table.select(range(min(len(table), self.limit or len(table))))
        texts = self._column(few, self.text)
        asked = [""] * len(few) if self.prompt is None else self._column(few, self.prompt)
        return [Document(text, prompt) for text, prompt in zip(texts, asked, strict=True)]

    def _column(self, table: Any, name: str) -> list[str]:
        found = list(table[name])
        for value in found:
            if not isinstance(value, str):
                raise DataError(f"{self.path}: column {name!r} holds {type(value).__name__}, no text")
        return found
