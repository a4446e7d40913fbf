"""Reading answers: the words of a text, and what it says in the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

import torch
from torch import Tensor

from limbeck.metrics.fidelity import UNPARSABLE

WORD = re.compile(r"\w+")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


def words(text: str) -> list[str]:
    """The words and numbers of a text, in small letters: what ROUGE-L and BLEU count."""
    return WORD.findall(text.lower())


def last_number(text: str) -> str | None:
    """The last number of a text in its plainest form, ``1,250.50`` as ``1250.5``; None where there is none.

    Source: the evaluation of Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442), on mathematical tasks.
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    value = Decimal(found[-1].replace(",", ""))
    return format(value.normalize() if value else abs(value), "f")


def answer_ids(texts: Sequence[Sequence[str]], *, numbers: bool) -> list[Tensor]:
    """What each text answers as an id: equal ids, equal answers.

    Args:
        texts: lists of texts, each [N]: of both networks, and the right ones.
        numbers: the answer is the last number; else all the words.

    Returns:
        int64 [N] for each list; ``UNPARSABLE`` where a text has no number, or no words.
    """
    known: dict[str, int] = {}
    found = []
    for each in texts:
        said = [last_number(text) if numbers else " ".join(words(text)) for text in each]
        ids = [known.setdefault(answer, len(known)) if answer else UNPARSABLE for answer in said]
        found.append(torch.tensor(ids, dtype=torch.int64))
    return found
