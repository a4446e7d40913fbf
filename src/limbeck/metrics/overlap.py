"""How much two texts share, word by word: BLEU and ROUGE-L.

Texts are sequences of tokens: words, or ids of one tokenizer for both sides. The libraries at hand take
strings and cut them themselves; here the caller says what a token is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from limbeck.errors import DataError, ShapeError

Text = Sequence[Hashable]


def corpus_bleu(candidates: Sequence[Text], references: Sequence[Text], n_max: int = 4) -> float:
    """BLEU of all texts together, in 0 .. 1: n-gram counts are pooled, and nothing is smoothed.

    The geometric mean of the clipped precisions of 1- to n-grams, times exp(1 - R / C) where the candidates'
    length C does not exceed that of the references, R. 0 where an order has no match. Not symmetric.

    Args:
        candidates: the student's texts.
        references: the teacher's texts, one each, of the same tokens.
        n_max: longest n-gram.

    Raises:
        ShapeError: they differ in number.
        DataError: there are none.

    Source: Papineni et al., ACL 2002; for rationales of student and teacher: arXiv 2505.15442.
    """
    _check(candidates, references)
    counts = [_matches(c, r, n_max) for c, r in zip(candidates, references, strict=True)]
    matched = [sum(c[n][0] for c in counts) for n in range(n_max)]
    possible = [sum(c[n][1] for c in counts) for n in range(n_max)]
    return _bleu(matched, possible, sum(map(len, candidates)), sum(map(len, references)))


def sentence_bleu(candidate: Text, reference: Text, n_max: int = 4) -> float:
    """BLEU of one text, in 0 .. 1, with one added to matches and counts of the orders from 2.

    Arguments as ``corpus_bleu``.

    Source: Papineni et al., ACL 2002; smoothing: Lin and Och, COLING 2004.
    """
    pairs = _matches(candidate, reference, n_max)
    matched = [m + (n > 0) for n, (m, _) in enumerate(pairs)]
    possible = [p + (n > 0) for n, (_, p) in enumerate(pairs)]
    return _bleu(matched, possible, len(candidate), len(reference))


def rouge_l(candidates: Sequence[Text], references: Sequence[Text]) -> float:
    """The mean over texts of the F1 of their longest common subsequence, in 0 .. 1; two empty texts give 0.

    Arguments and errors as ``corpus_bleu``.

    Source: Lin, ACL workshop 2004 (ROUGE-L, with equal weights of precision and recall).
    """
    _check(candidates, references)
    scores = [
        2 * common_subsequence(c, r) / max(1, len(c) + len(r))
        for c, r in zip(candidates, references, strict=True)
    ]
    return sum(scores) / len(scores)


def common_subsequence(one: Text, other: Text) -> int:
    """Length of the longest common subsequence.

    Source: Hyyrö 2004 (Bit-parallel LCS-length computation revisited): a row of the table is one integer.
    """
    places: dict[Hashable, int] = {}
    for i, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for token in other:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & full
    return len(one) - row.bit_count()


def _matches(candidate: Text, reference: Text, n_max: int) -> list[tuple[int, int]]:
    """(clipped matches, n-grams of the candidate) for n = 1 .. n_max."""
    found = []
    for n in range(1, n_max + 1):
        own, other = (Counter(zip(*(t[i:] for i in range(n)), strict=False)) for t in (candidate, reference))
        found.append(((own & other).total(), own.total()))
    return found


def _bleu(matched: Sequence[int], possible: Sequence[int], length: int, wanted: int) -> float:
    if not all(matched):
        return 0.0
    precision = sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / len(matched)
    return math.exp(precision + min(0.0, 1 - wanted / length))


def _check(candidates: Sequence[Text], references: Sequence[Text]) -> None:
    if len(candidates) != len(references):
        raise ShapeError(f"{len(candidates)} candidates but {len(references)} references: give one each")
    if not len(candidates):
        raise DataError("overlap over 0 texts: give at least one")
