"""Decoupled KD: the target class and the other classes are matched apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.kl import kl_divergence
from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

# What the official code takes from the target's scaled logit to leave it out of the softmax: exp(-1000) is 0
# in every precision, and unlike -inf it gives no 0 * inf in the divergence.
LEAVE_OUT = 1000.0


def decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """The two halves of T² · KL: target against all others (TCKD), and the others among themselves (NCKD).

    Per item, T² · KL = TCKD + (1 - p_target of the teacher) · NCKD.

    Args:
        student: logits [..., C].
        teacher: logits [..., C]; detached here.
        labels: target class [...] int64, in 0 .. C - 1.
        temperature: T > 0.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        (TCKD, NCKD), each >= 0 and reduced alike.

    Raises:
        ShapeError: the two differ in shape.

    Source: Zhao et al., CVPR 2022 (arXiv 2203.08679), eq. 6 and 7.
    Differs: the pair's probabilities are formed as logarithms, so that a target of probability 1 gives no
    log 0; with one class both halves are 0 (the official code gives NaN).
    """
    same_shape("logits", student, teacher)
    log_pair, others = _decouple(student, labels, temperature)
    log_pair_t, others_t = _decouple(teacher.detach(), labels, temperature)
    if student.shape[-1] == 1:
        zero = reduce(0.0 * others.sum(-1), mask=mask, weights=weights, reduction=reduction)
        return zero, zero
    target = temperature**2 * F.kl_div(log_pair, log_pair_t, reduction="none", log_target=True).sum(-1)
    rest = temperature**2 * kl_divergence(others, others_t, reduction="none")
    return (
        reduce(target, mask=mask, weights=weights, reduction=reduction),
        reduce(rest, mask=mask, weights=weights, reduction=reduction),
    )


def _decouple(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log of [p_target, p_others] as [..., 2], and the scaled logits [..., C] with the target left out."""
    scaled = full_precision(logits) / temperature
    target = F.one_hot(labels, logits.shape[-1]).bool()
    log_others = scaled.masked_fill(target, -torch.inf).logsumexp(-1)
    log_target = scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    log_pair = F.log_softmax(torch.stack([log_target, log_others], dim=-1), dim=-1)
    return log_pair, scaled - LEAVE_OUT * target.to(scaled.dtype)
