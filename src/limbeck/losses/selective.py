"""Distillation on the tokens that can still be learnt: those where the draft lags most behind a reference.

The gap of a token is KL(target ‖ draft) - KL(target ‖ reference): how much a network of the draft's size is
known to reach and the draft does not reach yet.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ConfigError, unknown
from limbeck.losses.divergences import counted_rows
from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

Normalise = Literal["selected", "all"]


def token_kl(student: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ student) of each token [...] at temperature 1, in nats.

    Gaps are differences of nearly equal sums: the order of operations is the official code's, so that the
    same tokens are selected as there.

    Args:
        student: logits [..., V].
        target: logits [..., V]; detached here.

    Source: AdaSPEC (arXiv 2510.19779), official code.
    """
    log_q, p = full_precision(student).log_softmax(-1), full_precision(target.detach()).softmax(-1)
    return F.kl_div(log_q.masked_fill(p == 0, 0), p, reduction="none").sum(-1)


def gap_threshold(gap: Tensor, fraction: float, mask: Tensor | None = None) -> Tensor:
    """The quantile 1 - fraction of the counted gaps, interpolated linearly.

    Args:
        gap: of each token [...], without a graph.
        fraction: share of the tokens that is kept, in (0, 1].
        mask: True = counts, [...].

    Returns:
        A scalar; NaN where nothing counts.

    Raises:
        ConfigError: ``fraction`` is out of range.

    Source: AdaSPEC (arXiv 2510.19779), official code: over the tokens of the batch at hand.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}: allowed are shares above 0, up to 1")
    counted = gap if mask is None else torch.where(mask.bool(), gap, torch.nan)
    return torch.nanquantile(counted, 1 - fraction) if gap.numel() else gap.new_full((), torch.nan)


def select(gap: Tensor, fraction: float, mask: Tensor | None = None) -> Tensor:
    """True [...] where the gap is not below ``gap_threshold``.

    Of n distinct ones that are floor(fraction · (n - 1)) + 1; equal ones at the threshold are all kept.
    Arguments and errors as there.

    Source: AdaSPEC (arXiv 2510.19779), algorithm 1.
    """
    chosen = gap >= gap_threshold(gap, fraction, mask)
    return chosen if mask is None else chosen & mask.bool()


def selection_weights(
    gap: Tensor, fraction: float, *, mask: Tensor | None = None, normalise: Normalise = "selected"
) -> Tensor:
    """Weights [...] >= 0 of the tokens: 0 where not selected, NaN in all where a counted gap is not finite.

    Args:
        gap: of each token [...]; detached here.
        fraction: share of the tokens that is kept, in (0, 1].
        mask: True = counts, [...].
        normalise: ``"selected"`` lets the weights sum to the number of counted tokens, so that a mean over
            those is the mean over the selected; ``"all"`` gives each selected one 1.

    Raises:
        ConfigError: a wrong ``fraction`` or ``normalise``.

    Source: AdaSPEC (arXiv 2510.19779), eq. 10 (``"selected"``) and its official code under trainers that pass
    the number of all label tokens (``"all"``).
    """
    if normalise not in get_args(Normalise):
        raise unknown("normalise", normalise, get_args(Normalise))
    gap = gap.detach()
    weights = select(gap, fraction, mask).to(gap.dtype)
    counted = gap if mask is None else torch.where(mask.bool(), gap, 0)
    if normalise == "selected":
        number = counted.numel() if mask is None else mask.sum()
        weights = weights * (number / weights.sum().clamp(min=1))
    # A network that fails selects nothing; 0 times its NaN lets the loss say so without a stop of the device.
    return weights + 0.0 * counted.sum()


def selective_kl(
    draft: Tensor,
    target: Tensor,
    reference: Tensor,
    fraction: float = 0.4,
    *,
    mask: Tensor | None = None,
    normalise: Normalise = "selected",
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(target ‖ draft) on the share of tokens with the largest gap, in nats, at temperature 1.

    Args:
        draft: logits [..., V] of the draft that learns.
        target: logits [..., V]; detached here.
        reference: logits [..., V] of a network of the draft's size that learnt on all tokens; detached here.
        fraction: k, share of the counted tokens that is kept; 1 keeps all.
        mask: True = counts, [...].
        normalise: see ``selection_weights``; ``"all"`` with ``reduction="sum"`` is the plain sum over the
            selected tokens, for a divisor of the caller's.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``; 0 where no token counts, NaN where a counted row
        of any of the three is not finite.

    Raises:
        ConfigError: a wrong ``fraction``, ``normalise`` or ``reduction``.
        ShapeError: the logits differ in shape.

    Source: AdaSPEC (arXiv 2510.19779), section 3 and algorithm 1.
    """
    same_shape("logits", draft, target)
    same_shape("logits", reference, target)
    items = token_kl(counted_rows(draft, mask), target)
    gap = items - token_kl(reference.detach(), target)
    weights = selection_weights(gap, fraction, mask=mask, normalise=normalise)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
