"""Perplexity by domain, and the shares of the data that follow from it: the further behind, the more."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError, ShapeError


def domain_perplexity(nll_sum: Tensor, token_count: Tensor) -> Tensor:
    """exp(Σ nll / tokens) of each domain: pooled over its tokens, not a mean over its texts.

    Args:
        nll_sum: summed cross entropy of each domain [N], nats.
        token_count: tokens that it was summed over [N].

    Returns:
        [N] >= 1, float64.

    Raises:
        DataError: a domain without tokens.
        NonFiniteError: a perplexity is not finite.

    Source: DDK (arXiv 2407.16154), section 3.1.
    """
    empty = (token_count <= 0).nonzero().flatten()
    if len(empty):
        raise DataError(f"domain {int(empty[0])} has no validation tokens: give it validation data")
    found = (nll_sum.double() / token_count).exp()
    _check_finite(found)
    return found


def initial_factor(student: Tensor, teacher: Tensor) -> Tensor:
    """Shares of the domains before training: softmax of the perplexities' ratios student / teacher, [N].

    After any interval it is DDK without its smooth updating.

    Args:
        student: perplexities [N] of the student.
        teacher: of the teacher [N].

    Raises:
        ShapeError: the two differ in shape.
        NonFiniteError: a perplexity is NaN, infinite or not above 0.

    Source: DDK (arXiv 2407.16154), eq. 1.
    """
    return _ratio(student, teacher).softmax(-1)


def update_factor(share: Tensor, student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Shares of the next interval: alpha · (share · exp(ratio), normalised) + (1 - alpha) / N, [N].

    Args:
        share: of the last interval [N]; sums to 1.
        student: perplexities [N] of the student now.
        teacher: of the teacher [N], which never change.
        alpha: smoothing, in [0, 1]; at 0 all domains count alike.

    Returns:
        [N] in (1 - alpha) / N .. alpha + (1 - alpha) / N; sums to 1.

    Raises:
        ShapeError: the three differ in shape.
        ConfigError: ``alpha`` is out of range.
        NonFiniteError: a perplexity is NaN, infinite or not above 0.

    Source: DDK (arXiv 2407.16154), eq. 2.
    Differs: computed as a softmax of log share + ratio, as ratios may be huge.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: allowed are values from 0 to 1")
    ratio = _ratio(student, teacher)
    if share.shape != ratio.shape:
        raise ShapeError(
            f"shares are {list(share.shape)} for perplexities {list(ratio.shape)}: give one a domain"
        )
    return alpha * (share.double().log() + ratio).softmax(-1) + (1 - alpha) / len(share)


def _ratio(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape or student.ndim != 1:
        raise ShapeError(
            f"perplexities are {list(student.shape)} and {list(teacher.shape)}: give one of each per domain"
        )
    for perplexity in (student, teacher):
        _check_finite(perplexity)
    return student.double() / teacher.double()


def _check_finite(perplexity: Tensor) -> None:
    bad = (~(torch.isfinite(perplexity) & (perplexity > 0))).nonzero().flatten()
    if len(bad):
        place = int(bad[0])
        raise NonFiniteError(
            f"the perplexity of domain {place} is {float(perplexity[place])}: mend the model or its "
            "validation data"
        )
