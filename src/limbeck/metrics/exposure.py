"""Exposure of canaries: how far a model prefers a secret that it saw to all that it might have seen.

A canary is a text with a slot that was filled at random; its space is all fillings. Texts are compared by
their log-perplexity, in bits; only the slot's tokens need be summed, as the rest is the same for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from scipy import stats
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError


class Exposure(NamedTuple):
    """Where a canary stands among all fillings.

    Attributes:
        rank: 1 = the model finds none more likely.
        bits: log2 of the space over the rank, from 0 to log2 of the space.
    """

    rank: int
    bits: float


def sequence_log_perplexity(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """-Σ_t log2 Pr(token t | what stands before it), in bits.

    Args:
        logits: that predict these tokens, [..., T, V].
        tokens: ids [..., T] int64.
        mask: True = counts, [..., T]; None = all.

    Returns:
        [...] >= 0, in float64.

    Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), definition 1.
    """
    log_probs = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if mask is not None:
        log_probs = torch.where(mask.bool(), log_probs, 0)
    return -log_probs.sum(-1) / math.log(2)


def exposure(canary: float, candidates: Tensor, space: int) -> Exposure:
    """log2 |R| - log2 rank, with the rank among all fillings; those that are equal to it do not come before.

    Args:
        canary: its log-perplexity.
        candidates: those of every other filling [|R| - 1].
        space: |R| >= 1.

    Raises:
        DataError: not every other filling is there: a sample tells ``exposure_sampled``.
        NonFiniteError: a log-perplexity is NaN.

    Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), definitions 3 and 4.
    """
    if len(candidates) != space - 1:
        raise DataError(
            f"{len(candidates)} candidates for a space of {space}: give every other filling, or use "
            "exposure_sampled"
        )
    _check(canary, candidates)
    rank = 1 + int((candidates < canary).sum())
    return Exposure(rank, math.log2(space) - math.log2(rank))


def exposure_sampled(canary: float, sample: Tensor) -> float:
    """-log2((#{Px <= Px(canary)} + 1) / (n + 1)), in bits, from fillings drawn at random.

    Never above log2(n + 1): draw as many as the exposure that is to be told.

    Args:
        canary: its log-perplexity.
        sample: those of n fillings [n].

    Raises:
        DataError: an empty sample.
        NonFiniteError: a log-perplexity is NaN.

    Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), section 4.3, approximation by sampling.
    Differs: one is added to both counts, which keeps it finite.
    """
    if not len(sample):
        raise DataError("exposure over a sample of 0 fillings: give at least one")
    _check(canary, sample)
    below = int((sample <= canary).sum())
    return -math.log2((below + 1) / (len(sample) + 1))


@dataclass(frozen=True)
class SkewNormal:
    """The law of the log-perplexities of all fillings, for spaces that cannot be gone through.

    Attributes:
        shape: skewness parameter; 0 is the normal law.
        loc: location, bits.
        scale: > 0, bits.
        p_value: of the Kolmogorov-Smirnov test of the sample that it was fitted to; None = not fitted. A
            small one says that the law does not fit, and its exposures mean nothing.
    """

    shape: float
    loc: float
    scale: float
    p_value: float | None = None

    @classmethod
    def fit(cls, sample: Tensor) -> Self:
        """The most likely law for the log-perplexities of fillings drawn at random [n], with its test.

        Raises:
            DataError: fewer than 10 of them, or all alike.
            NonFiniteError: one is not finite.

        Source: Carlini et al., USENIX Security 2019 (arXiv 1802.08232), section 4.3.
        """
        values = sample.double().cpu()
        if len(values) < 10 or bool((values == values[0]).all()):
            raise DataError(f"{len(values)} log-perplexities, or all alike: draw at least 10 that differ")
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError("a log-perplexity of the sample is not finite: mend the model")
        shape, loc, scale = (float(x) for x in stats.skewnorm.fit(values.numpy()))
        test = stats.kstest(values.numpy(), stats.skewnorm(shape, loc, scale).cdf)
        return cls(shape, loc, scale, float(test.pvalue))

    def exposure(self, canary: float) -> float:
        """-log2 of the chance that a filling has at most the log-perplexity ``canary``, in bits.

        Raises:
            ConfigError: ``scale`` is not above 0.
        """
        if not self.scale > 0:
            raise ConfigError(f"scale is {self.scale}: allowed are values above 0")
        return -float(stats.skewnorm.logcdf(canary, self.shape, self.loc, self.scale)) / math.log(2)


def _check(canary: float, others: Tensor) -> None:
    if math.isnan(canary) or bool(torch.isnan(others).any()):
        raise NonFiniteError("a log-perplexity is NaN: mend the model before its exposure is measured")
