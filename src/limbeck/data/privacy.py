"""Which characters and tokens of a text are private, and canaries that show whether a model kept them.

A detector gives each character of a text a score in 0 .. 1; a learnt tagger is one where it returns
probabilities. Built in are patterns for what has a form. What has none (a street, a diagnosis) they miss.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck.bounded import bounded
from limbeck.errors import ConfigError, DataError, unknown

Scores = npt.NDArray[np.float32]
Detector = Callable[[str], Scores]

SLOT = "#"  # a digit to fill in, in the format of a canary
DIGITS = "0123456789"


@dataclass(frozen=True)
class Pattern:
    """A detector that gives ``score`` to what a regular expression finds.

    Attributes:
        expression: of Python's ``re``. Where it has a group named ``private``, that part alone is scored.
        score: in (0, 1].

    Raises:
        ConfigError: no regular expression, or a wrong score; when called, one that takes seconds on a text.
    """

    expression: str
    score: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.score <= 1:
            raise ConfigError(f"score is {self.score}: allowed are values above 0, up to 1")
        try:
            re.compile(self.expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{self.expression!r} is no regular expression: {error}") from None

    def __call__(self, text: str) -> Scores:
        scores = np.zeros(len(text), np.float32)
        try:
            with bounded():
                for found in re.finditer(self.expression, text):
                    start, stop = found.span("private" if "private" in found.re.groupindex else 0)
                    scores[start:stop] = self.score
        except TimeoutError as error:
            raise ConfigError(
                f"the expression {self.expression!r} does not come to an end in a text of {len(text)} "
                f"characters ({error}): write it without repetitions within repetitions"
            ) from error
        return scores


# Runs of digits, which may be parted as cards and phone numbers are written. Dates written in digits are
# taken for phone numbers: too much is shielded rather than too little.
PATTERNS: dict[str, Pattern] = {
    "digits": Pattern(r"\d{4,}"),
    "email": Pattern(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "phone": Pattern(r"(?<![\w.])(?:\+\d|\(\d|\d)(?:[ ./()-]{0,2}\d){6,14}(?![\w])"),
    "card": Pattern(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)"),
    "iban": Pattern(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    # A capitalised word behind another word of its sentence: at its head every word is capitalised.
    "name": Pattern(
        r"(?<=[\w,;:)'\"’”]\s)(?P<private>[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ'’-][\w'’-]*)",
        0.5,
    ),
}


def pattern(name: str) -> Pattern:
    """The pattern of that name in ``PATTERNS``, or the regular expression behind ``re:``.

    Raises:
        ConfigError: no such name, or no regular expression.
    """
    if name.startswith("re:"):
        return Pattern(name.removeprefix("re:"))
    if name not in PATTERNS:
        raise unknown("pattern", name, [*PATTERNS, "re:..."])
    return PATTERNS[name]


def privacy_scores(text: str, detectors: Sequence[Detector] = tuple(PATTERNS.values())) -> Scores:
    """How private each character is: the largest score of all detectors, [len(text)] in 0 .. 1.

    Raises:
        DataError: a detector that gives another number of scores, or one outside 0 .. 1.

    Source: the privacy score of swing distillation (arXiv 2212.08349), after its abstract.
    Differs: the detectors are our choice; the paper's are not known to us.
    """
    scores = np.zeros(len(text), np.float32)
    for detector in detectors:
        found = np.asarray(detector(text), np.float32)
        if found.shape != scores.shape or not ((found >= 0) & (found <= 1)).all():
            raise DataError(
                f"a detector gave scores {list(found.shape)} for {len(text)} characters, or some outside "
                "0..1: give one in 0..1 for each"
            )
        scores = np.maximum(scores, found)
    return scores


def token_scores(scores: Scores, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """How private each token is: the largest score of the characters that it covers, [T] float32.

    A token that is partly inside a private span counts fully; one that covers nothing counts 0. The score is
    that of the token itself: where a loss predicts it, shift it together with the labels.

    Args:
        scores: of each character.
        offsets: (start, stop) of each token in characters, as fast tokenizers give them.

    Raises:
        DataError: an offset that leaves the text.
    """
    if not len(offsets):
        return torch.zeros(0)
    spans = np.asarray(offsets, dtype=np.int64)
    if spans.min() < 0 or spans.max() > len(scores) or (spans[:, 0] > spans[:, 1]).any():
        raise DataError(
            f"a token's offsets leave the text of {len(scores)} characters: tokenise that very text"
        )
    # reduceat takes the maximum of each span; it reads one place past the last, and a lone one for an empty.
    largest = np.maximum.reduceat(np.append(scores, np.float32(0)), spans.flatten())[::2]
    return torch.from_numpy(np.where(spans[:, 0] < spans[:, 1], largest, np.float32(0)))


def fill(format: str, secret: str) -> str:
    """The canary: ``format`` with its slots filled by the digits of ``secret`` in turn.

    Raises:
        ConfigError: not one digit per slot, or no slot.
    """
    slots = format.count(SLOT)
    if slots != len(secret) or not slots or not set(secret) <= set(DIGITS):
        raise ConfigError(f"{format!r} has {slots} slots {SLOT!r} for {secret!r}: give one digit for each")
    digits = iter(secret)
    return "".join(next(digits) if character == SLOT else character for character in format)


def secrets(format: str) -> Iterator[str]:
    """All that the slots of ``format`` can hold, in order: the canary's space, 10 to the number of slots."""
    return map("".join, itertools.product(DIGITS, repeat=format.count(SLOT)))


def draw_secrets(format: str, count: int, generator: torch.Generator) -> list[str]:
    """``count`` different secrets, drawn evenly from the space.

    Raises:
        ConfigError: the space has fewer.
    """
    slots = format.count(SLOT)
    if not 0 <= count <= 10**slots:
        raise ConfigError(f"{count} secrets for {format!r}: its space has {10**slots}")
    found: dict[str, None] = {}
    while len(found) < count:
        digits = torch.randint(10, (slots,), generator=generator).tolist()
        found["".join(map(str, digits))] = None
    return list(found)


def canary_detector(format: str) -> Pattern:
    """A detector of the canaries of ``format`` that gives 1 to what stands in the slots and nothing else.

    The slots must lie side by side.

    Raises:
        ConfigError: they do not, or there is none.
    """
    slots = format.count(SLOT)
    before, found, after = format.partition(SLOT * max(slots, 1))
    if not found:
        raise ConfigError(f"the slots {SLOT!r} of {format!r} do not lie side by side: write them as one run")
    return Pattern(rf"{re.escape(before)}(?P<private>\d{{{slots}}}){re.escape(after)}")


def insert_canaries(
    text: str, format: str, secrets: Sequence[str], times: int, generator: torch.Generator
) -> str:
    """``text`` with the canary of each secret put ``times`` between its words, at places drawn evenly.

    Args:
        text: words parted by white space, which is kept.
        format: of the canary, with ``SLOT`` for each digit.
        secrets: one canary each.
        times: how often each is inserted, >= 0.
        generator: draws the places.

    Raises:
        ConfigError: a secret that does not fit, or ``times`` below 0.
        DataError: the text has no white space to insert at.

    Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), section 4.
    """
    if times < 0:
        raise ConfigError(f"times is {times}: allowed are numbers from 0")
    canaries = [fill(format, secret) for secret in secrets for _ in range(times)]
    gaps = [found.start() for found in re.finditer(r"\s+", text)]
    if not gaps:
        raise DataError("the text has no white space: canaries are inserted between words")
    drawn = torch.randint(len(gaps), (len(canaries),), generator=generator).tolist()
    parts, done = [], 0
    for place, canary in sorted(zip(drawn, canaries, strict=True)):
        parts += [text[done : gaps[place]], " ", canary]
        done = gaps[place]
    return "".join([*parts, text[done:]])
