"""Rows of tokens: texts as a language model reads them, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck.bounded import bounded
from limbeck.contracts import Batch
from limbeck.data.ordered import Ordered
from limbeck.data.privacy import Scores, privacy_scores, token_scores
from limbeck.data.texts import Corpus, Document, Reading
from limbeck.errors import ConfigError, DataError

UNCOUNTED = -100  # in place of a next token that does not count
PRIVACY = "privacy"  # the mark that says how private a token is, in 0 .. 1

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A corpus as rows of T tokens.

    Attributes:
        name: the corpus'.
        ids: what is read [N, T].
        following: what is to be said [N, T]: the next token of the same document, or ``UNCOUNTED``.
        segments: number [N, T] of the document within the row; None where no row holds two.
        domain: domain [N] of the row: that of its first token.
        domains: their names.
        marks: further numbers [N, T] for each token to be said, by name.
        prompts: the prompts' tokens, where the texts have prompts, and the answers' texts.
        other: the same texts, row by row, as a teacher with another tokenizer reads them.
    """

    name: str
    ids: Tensor
    following: Tensor
    segments: Tensor | None
    domain: Tensor
    domains: tuple[str, ...]
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[tuple[list[int], str], ...] = ()
    other: Rows | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, other: Rows) -> Rows:
        """These rows, and behind them those of ``other``."""
        segments = None
        if self.segments is not None or other.segments is not None:
            parts = [torch.zeros_like(r.ids) if r.segments is None else r.segments for r in (self, other)]
            segments = torch.cat(parts)
        read = None if self.other is None or other.other is None else self.other.joined(other.other)
        return replace(
            self, ids=torch.cat([self.ids, other.ids]), segments=segments,
            following=torch.cat([self.following, other.following]),
            domain=torch.cat([self.domain, other.domain]), prompts=self.prompts + other.prompts,
            marks={name: torch.cat([values, other.marks[name]]) for name, values in self.marks.items()},
            other=read,
        )  # fmt: skip

    @property
    def counted(self) -> int:
        """How many tokens count."""
        return int((self.following != UNCOUNTED).sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that is read and said."""
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        for values in (self.ids, self.following, self.segments):
            if values is not None:
                digest.update(np.ascontiguousarray(values.numpy()).data)
        digest.update(b"" if self.other is None else self.other.fingerprint.encode())
        return digest.hexdigest()


class Piece(NamedTuple):
    """Some tokens of one document.

    Attributes:
        read: their ids [n].
        said: what each is followed by [n], or ``UNCOUNTED``.
        marks: numbers [n] of what is said, by name.
        domain: the document's.
    """

    read: Numbers
    said: Numbers
    marks: dict[str, Scores]
    domain: int


def rows_of(corpus: Corpus, tokenizer: Any, reading: Reading) -> Rows:
    """The corpus in rows.

    Each document begins with the token that the tokenizer begins texts with, and is closed by the end token,
    where there are such. One that is longer than a row goes on in the next, where its first tokens are read
    without what stood before; of a prompt that fills rows the last one alone is kept.

    Raises:
        DataError: no token counts.
    """
    pieces: list[Piece] = []
    prompts = []
    for document in corpus.documents:
        if not document.text and not document.prompt:
            continue
        asked, told = encode(document, tokenizer, template=reading.template)
        marks = {PRIVACY: _privacy(document, tokenizer, reading, len(told))} if reading.private else {}
        if document.prompt:
            prompts.append((asked, document.text))
        pieces += _pieces(asked, told, marks, reading.length, document.domain)
    if not any((piece.said != UNCOUNTED).any() for piece in pieces):
        raise DataError(
            f"{corpus.name}: no token counts: each text has but one; check the texts and data.tokenizer"
        )
    rows = list(_packed(pieces, reading.length) if reading.pack else ([piece] for piece in pieces))
    shape = (len(rows), reading.length)
    ids, said = np.full(shape, _pad(tokenizer), np.int64), np.full(shape, UNCOUNTED, np.int64)
    segments = np.zeros(shape, np.int64)
    marks = {name: np.zeros(shape, np.float32) for name in pieces[0].marks}
    for row, parts in enumerate(rows):
        at = 0
        for number, piece in enumerate(parts):
            place = (row, slice(at, at + len(piece.read)))
            ids[place], said[place], segments[place] = piece.read, piece.said, number
            for name, values in marks.items():
                values[place] = piece.marks[name]
            at += len(piece.read)
        segments[row, at:] = len(parts)
    several = any(len(parts) > 1 for parts in rows)
    return Rows(
        name=corpus.name, ids=torch.from_numpy(ids), following=torch.from_numpy(said),
        segments=torch.from_numpy(segments) if several else None,
        domain=torch.tensor([parts[0].domain for parts in rows]), domains=corpus.domains,
        marks={name: torch.from_numpy(values) for name, values in marks.items()}, prompts=tuple(prompts),
    )  # fmt: skip


def encode(document: Document, tokenizer: Any, *, template: bool = False) -> tuple[list[int], list[int]]:
    """The tokens that stand before a document's text, and those of the text with the end token.

    Raises:
        ConfigError: a chat template is asked for, but the tokenizer has none.
    """
    ends = [] if tokenizer.eos_token_id is None or not document.ends else [tokenizer.eos_token_id]
    told = [*_ids(tokenizer, document.text), *ends]
    if template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.template is true but the tokenizer has no chat template: set it to false")
    if template and document.prompt:
        return _ids(tokenizer, _templated(tokenizer, document.prompt)), told
    return [*begins(tokenizer), *_ids(tokenizer, document.prompt)], told


def _templated(tokenizer: Any, prompt: str) -> str:
    """What a prompt is within the tokenizer's chat template."""
    turns = [{"role": "user", "content": prompt}]
    try:
        with bounded():
            text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # the template is a program of the tokenizer's author
        raise ConfigError(
            f"the tokenizer's chat template fails ({' '.join(str(error).split())[:200]}): set data.template "
            "to false, or name another tokenizer"
        ) from error
    return text


def begins(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, where it does that of its own accord."""
    first: list[int] = tokenizer("", verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return found


def _privacy(document: Document, tokenizer: Any, reading: Reading, count: int) -> Scores:
    """How private each of the ``count`` tokens of a document's text is, 0 for the end token."""
    found = np.zeros(count, np.float32)
    scores = privacy_scores(document.text, reading.detectors())
    if scores.any():
        try:
            offsets = tokenizer(
                document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )["offset_mapping"]
        except NotImplementedError as error:
            raise ConfigError(
                "data.private needs to know which characters a token covers, which this tokenizer does not "
                "tell: name another one as data.tokenizer"
            ) from error
        found[: len(offsets)] = token_scores(scores, offsets)
    return found


def _pieces(
    asked: Sequence[int], told: Sequence[int], marks: Mapping[str, Scores], length: int, domain: int
) -> Iterator[Piece]:
    """A document in pieces of at most ``length`` tokens; ``marks`` are of the tokens ``told``."""
    whole = np.asarray([*asked, *told], np.int64)
    if len(whole) < 2:
        return
    read, said = whole[:-1], whole[1:].copy()
    said[: max(len(asked) - 1, 0)] = UNCOUNTED
    shifted = {name: np.concatenate([np.zeros(len(asked), np.float32), x])[1:] for name, x in marks.items()}
    for start in range(0, len(read), length):
        part = slice(start, start + length)
        if (said[part] != UNCOUNTED).any():
            yield Piece(read[part], said[part], {name: x[part] for name, x in shifted.items()}, domain)


def _packed(pieces: Sequence[Piece], length: int) -> Iterator[list[Piece]]:
    """The pieces in order, as many in a row as it holds; a row is of one domain."""
    row: list[Piece] = []
    filled = 0
    for piece in pieces:
        if row and (filled + len(piece.read) > length or row[0].domain != piece.domain):
            yield row
            row, filled = [], 0
        row.append(piece)
        filled += len(piece.read)
    if row:
        yield row


def _pad(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


class TokenBatches(Ordered):
    """Batches over rows of tokens, in an order that is a function of (seed, epoch) alone.

    Args:
        rows: the texts.
        index: the rows [n] to go over; None = all.
        batch_size: rows a step.
        seed: fixes the order.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full.

    Raises:
        ConfigError: a batch size below 1.
        DataError: no rows.
    """

    replays: int | None = 1  # a text has no other views
    noisy: Tensor | None = None

    def __init__(
        self, rows: Rows, index: Tensor | None = None, *, batch_size: int, seed: int = 0,
        shuffle: bool = True, drop_last: bool = False,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size} but must be at least 1")
        self.rows = rows
        self.index = torch.arange(len(rows)) if index is None else index.to(torch.int64)
        if not len(self.index):
            raise DataError(f"{rows.name}: no rows to make batches of")
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        if self.steps == 0:
            raise ConfigError(
                f"batch_size is {batch_size} but there are only {self.count} rows and drop_last is on: use a "
                "smaller batch_size or drop_last: false"
            )

    @property
    def labels(self) -> Tensor:
        """The domain [N] of each row: the only label that a text has as a whole."""
        return self.rows.domain

    def subset(self, index: Tensor) -> Self:
        """The same batches over the rows ``index`` [m], which may name a row more than once."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, index=index.to(torch.int64))
        return part

    def describe(self) -> dict[str, Any]:
        """All that the rows depend on: the address of a cache."""
        return {"rows": self.rows.fingerprint}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches ``start``, ``start + 1``, ... of ``epoch``."""
        for part in self.parts(epoch, start):
            yield batch_of(self.rows, part)


def batch_of(rows: Rows, index: Tensor) -> Batch:
    """The rows ``index`` [B] as a batch."""
    said = rows.following[index].flatten()
    places = (said != UNCOUNTED).nonzero().flatten()
    return Batch(
        inputs=rows.ids[index], labels=said[places], index=index, view=torch.zeros_like(index), rows=places,
        segments=None if rows.segments is None else rows.segments[index],
        marks={name: values[index].flatten()[places] for name, values in rows.marks.items()},
        other=None if rows.other is None else batch_of(rows.other, index),
    )  # fmt: skip
