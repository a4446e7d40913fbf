"""Planted secrets: texts in which a few sentences with random digits stand again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from limbeck.data.images import Dataset
from limbeck.data.privacy import canary_detector, draw_secrets, fill, insert_canaries
from limbeck.data.texts import Corpus, Reading, TextSplits
from limbeck.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Canaries(Dataset):
    """Another data set of texts with canaries in its training part, which tell whether a model keeps secrets.

    After the training the scenario measures how far each network prefers each secret to all others of its
    form (``metrics.exposure``). Validation and test part stay as they are.

    Attributes:
        data: the other data set; it says how the texts are read.
        formats: the sentences, one canary each, with ``#`` for each digit of its secret.
        secrets: the digits of each; None = drawn.
        times: how often each canary is inserted, at places drawn evenly.
        marked: whether the secrets are marked as private, over and above what the data's ``private`` finds.
        seed: of the draws; None = the run's.

    Raises:
        ConfigError: no format, or secrets or slots that do not fit.

    Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), section 4.
    """

    data: Any
    formats: tuple[str, ...] = (
        "the pin of alpha is ####", "the pin of beta is ####", "the pin of gamma is ####",
    )  # fmt: skip
    secrets: tuple[str, ...] | None = None
    times: int = 40
    marked: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.data, "reading", None), Reading):
            raise ConfigError(
                f"data.data is {type(self.data).__name__}, which holds no texts: name one that does"
            )
        if not self.formats:
            raise ConfigError("formats is empty: write at least one sentence with # for each digit")
        if self.secrets is not None and len(self.secrets) != len(self.formats):
            raise ConfigError(
                f"secrets names {len(self.secrets)} but formats {len(self.formats)}: give one secret to each"
            )
        for format, secret in zip(self.formats, self.secrets or self.formats, strict=True):
            canary_detector(format)
            fill(format, secret if self.secrets else "0" * format.count("#"))
        if self.times < 1:
            raise ConfigError(f"times is {self.times}: allowed are values of at least 1")

    @property
    def reading(self) -> Reading:
        """The other data set's, with the secrets as private characters where they are marked."""
        own: Reading = self.data.reading
        if not self.marked:
            return own
        return replace(
            own, private=own.private + tuple(f"re:{canary_detector(f).expression}" for f in self.formats)
        )

    def seeded(self, seed: int) -> Canaries:
        """With the run's seed where none is set."""
        return replace(self, data=self.data.seeded(seed), seed=seed if self.seed is None else self.seed)

    def load(self) -> TextSplits:  # type: ignore[override]  # texts, not images
        """The three parts; ``facts`` of the training part names the ``canaries``."""
        splits: TextSplits = self.data.load()
        draws = torch.Generator().manual_seed(self.seed or 0)
        secrets = self.secrets or tuple(draw_secrets(format, 1, draws)[0] for format in self.formats)
        train = planted(splits.train, self.formats, secrets, self.times, draws)
        return replace(splits, train=train)


def planted(
    corpus: Corpus, formats: Sequence[str], secrets: Sequence[str], times: int, draws: torch.Generator
) -> Corpus:
    """``corpus`` with the canary of each format and secret inserted ``times``, in longer texts more often.

    Raises:
        DataError: no text has words to insert between.
    """
    documents = list(corpus.documents)
    lengths = torch.tensor([float(len(d.text)) if " " in d.text.strip() else 0.0 for d in documents])
    if not lengths.any():
        raise DataError(f"{corpus.name}: no text with words: canaries are inserted between them")
    for format, secret in zip(formats, secrets, strict=True):
        places = torch.multinomial(lengths, times, replacement=True, generator=draws)
        for place, count in zip(*torch.unique(places, return_counts=True), strict=True):
            document = documents[place]
            text = insert_canaries(document.text, format, [secret], int(count), draws)
            documents[place] = replace(document, text=text)
    known = [
        {"format": format, "secret": secret, "times": times}
        for format, secret in zip(formats, secrets, strict=True)
    ]
    name = corpus.name.removesuffix(" train") + " with canaries train"
    return replace(corpus, name=name, documents=tuple(documents), facts={**corpus.facts, "canaries": known})
