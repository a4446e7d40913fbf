"""Concentrated knowledge: the teacher's few most probable tokens, re-calibrated, as the target.

K tokens are kept of V. Probabilities are those of the full softmax, the largest first; their sum, the
coverage, is at most 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import ConfigError, NonFiniteError, ShapeError, unknown
from limbeck.losses.divergences import counted_rows
from limbeck.losses.reduction import Reduction, full_precision, reduce

# Added to each probability before they are normalised, as the official code does.
EPS = 1e-6

Scaling = Literal["linear", "probability", "power"]


def top_probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids [..., K] int64 and probabilities [..., K] of the K largest, of the softmax over all V.

    Made for what is stored: reading whether a row is finite stops the device.

    Args:
        logits: of the teacher [..., V]; -inf is allowed.
        k: K in 1 .. V.

    Raises:
        ConfigError: ``k`` is out of range.
        NonFiniteError: a row holds a NaN or +inf, or nothing but -inf.

    Source: FIRST (arXiv 2408.12168), concentrated knowledge; K = 5 there.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ConfigError(f"k is {k}: allowed are 1 up to the {logits.shape[-1]} tokens of the vocabulary")
    found = full_precision(logits).softmax(-1).topk(k, dim=-1)
    bad = (~torch.isfinite(found.values).all(-1)).flatten().nonzero()
    if len(bad):
        raise NonFiniteError(f"the teacher's logits of row {int(bad[0])} are not finite: mend the teacher")
    return found.indices, found.values


def linear_normalise(probs: Tensor, eps: float = EPS) -> Tensor:
    """(p + eps) / Σ (p + eps) over the last axis.

    Args:
        probs: >= 0, [..., K].
        eps: > 0 where a row may be all 0.

    Source: FIRST, official code (``use_norm linear``).
    """
    raised = probs + eps
    return raised / raised.sum(-1, keepdim=True)


def with_rest(probs: Tensor) -> Tensor:
    """``probs`` [..., K] and behind them what they leave of 1: [..., K + 1].

    Source: FIRST, official code (``use_other_token``).
    """
    return torch.cat([probs, (1 - probs.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)


def recalibrate(probs: Tensor, scaling: Scaling, c: float = 1.0, eps: float = EPS) -> Tensor:
    """The target that a student matches: the kept probabilities, scaled by the temperature c and normalised.

    ``linear`` keeps their ratios. ``probability`` is a softmax over the probabilities themselves, p / c, so
    the ratio of the largest to the smallest is at most exp((p_1 - p_K) / c): with c near 1 it is almost even.
    ``power`` is p^(1/c), what an ordinary temperature does to the softmax they came from.

    Args:
        probs: >= 0, [..., K].
        scaling: which of the three.
        c: temperature > 0; not read by ``linear``.
        eps: see ``linear_normalise``; read by ``linear`` alone.

    Returns:
        [..., K]; sums to 1, in the same order as ``probs``.

    Raises:
        ConfigError: a wrong ``scaling``, or ``c`` is not above 0.

    Source: FIRST (arXiv 2408.12168), trustworthy maximisation; ``probability`` is its official code
    (``use_norm softmax``).
    Differs: ``power`` is an addition.
    """
    if scaling not in get_args(Scaling):
        raise unknown("scaling", scaling, get_args(Scaling))
    if not c > 0:
        raise ConfigError(f"c is {c}: allowed are temperatures above 0")
    if scaling == "linear":
        return linear_normalise(probs, eps)
    return ((probs if scaling == "probability" else probs.log()) / c).softmax(-1)


def label_smooth(probs: Tensor, delta: float, *, keep_order: bool = True) -> Tensor:
    """delta is taken from the first probability and shared among the K - 1 others; the sum stays.

    Args:
        probs: [..., K], the largest first.
        delta: >= 0; the official code's is 0.1.
        keep_order: take no more than what leaves the first one level with the second, so that no row's
            answer changes and none falls below 0.

    Raises:
        ConfigError: ``delta`` is below 0.
        ShapeError: there is but one probability.

    Source: FIRST (arXiv 2408.12168), trustworthy maximisation by label smoothing.
    Differs: the official code smooths log-probabilities of both sides, in place; this is for the teacher's
    probabilities. ``keep_order`` is an addition.
    """
    k = probs.shape[-1]
    if not delta >= 0:
        raise ConfigError(f"delta is {delta}: allowed are values from 0")
    if k < 2:
        raise ShapeError(f"probabilities are {list(probs.shape)}: keep at least 2 tokens to smooth them")
    taken = torch.full_like(probs[..., :1], delta)
    if keep_order:
        taken = taken.minimum((probs[..., :1] - probs[..., 1:2]) * ((k - 1) / k))
    return torch.cat([probs[..., :1] - taken, probs[..., 1:] + taken / (k - 1)], dim=-1)


def target_with_rest(probs: Tensor, scaling: Scaling, c: float = 1.0, eps: float = EPS) -> Tensor:
    """[coverage · recalibrated, 1 - coverage], normalised: [..., K + 1], where the tail keeps its mass.

    Arguments and errors as ``recalibrate``.

    Source: the remaining-mass bucket of FIRST's official code.
    Differs: the kept tokens are scaled among themselves; there the bucket is scaled with them.
    """
    coverage = probs.sum(-1, keepdim=True)
    return linear_normalise(
        torch.cat([coverage * recalibrate(probs, scaling, c, eps), 1 - coverage], -1), eps
    )


def first_loss(
    student: Tensor,
    ids: Tensor,
    target: Tensor,
    *,
    eps: float = EPS,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(target ‖ the student's probabilities at the teacher's tokens, normalised), in nats.

    A target of K + 1 entries has the remaining mass as its last one; the student's is then set beside it.
    Without that the student's probabilities elsewhere are free: only a student that is trained already
    should be matched so.

    Args:
        student: logits [..., V].
        ids: the teacher's tokens [..., K] int64, each once.
        target: [..., K], or [..., K + 1] with the rest; sums to 1; detached here.
        eps: see ``linear_normalise``, of the student's side.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ShapeError: the target has neither K nor K + 1 entries.

    Source: FIRST (arXiv 2408.12168), official code.
    Differs: the mean runs over counted tokens; the official code divides their sum by the number of sequences
    (``reduction="sum"`` leaves that to the caller). With the rest the official code takes probabilities for
    log-probabilities; here they are logarithms.
    """
    k = ids.shape[-1]
    if target.shape[:-1] != ids.shape[:-1] or target.shape[-1] not in (k, k + 1):
        raise ShapeError(
            f"the target is {list(target.shape)} for ids {list(ids.shape)}: give one probability per id, and "
            "at most one more for the rest"
        )
    kept = full_precision(counted_rows(student, mask)).softmax(-1).gather(-1, ids)
    own = kept if target.shape[-1] == k else with_rest(kept)
    wanted = full_precision(target.detach())
    log_own = linear_normalise(own, eps).log()
    items = (torch.xlogy(wanted, wanted) - wanted * log_own).sum(-1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
