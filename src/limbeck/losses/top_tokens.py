"""Divergences from a teacher of whom only the likeliest tokens are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses.divergences import Divergence, Pair, counted_rows, log_distribution, seen
from limbeck.losses.reduction import Reduction, full_precision, reduce


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The teacher's K likeliest tokens at each position.

    Attributes:
        ids: [..., K] int64, each at most once.
        log_probs: [..., K] of the softmax over the whole vocabulary, so they do not sum to 1, at the
            temperature that the student's logits are divided by; -inf where there is no further token, and
            then any id may stand there.
        tail: True: all other tokens are one more outcome, of both networks. Then a divergence is a lower
            bound of the one over the vocabulary, and equal to it for K = V. False: both networks are
            normalised over the K tokens, so that nothing holds the student back from all others, and K = 1
            says nothing.
    """

    ids: Tensor
    log_probs: Tensor
    tail: bool = True

    def __getitem__(self, rows: slice) -> Self:
        """Those of some positions along the first axis."""
        return replace(self, ids=self.ids[rows], log_probs=self.log_probs[rows])


def top_divergence(
    divergence: Divergence,
    student: Tensor,
    teacher: TopTokens,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A divergence of the student's next token from the teacher's, where the teacher's top K are known.

    Args:
        divergence: which; over K + 1 outcomes with the tail, over K without it.
        student: logits [..., V].
        teacher: its top tokens [..., K]; detached here.
        temperature: T > 0; divides the student's logits alone.
        mask: True = counts, shape [...] or its leading axes. What does not count may be NaN, on both sides.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        A scalar, or [...] with ``reduction="none"``, in nats.

    Raises:
        ShapeError: the two have other positions.

    Source: TRL 1.16 (huggingface/trl), server distillation trainer.
    Differs: TRL forms the student's tail as 1 - Σ and holds it above 1e-7, where its gradient ends; here the
    tail is the sum of what the other tokens have.
    """
    same_positions(student, teacher)
    ids, log_p = counted_rows(teacher.ids, mask), teacher.log_probs.detach()
    log_q = log_distribution(full_precision(counted_rows(student, mask)) / temperature)
    rest = None
    if teacher.tail:
        kept = torch.zeros_like(log_q).scatter_add(-1, ids, (~log_p.isinf()).to(log_q)) > 0
        rest = torch.where(kept, 0, log_q.exp()).sum(-1, keepdim=True)
    found = outcomes(log_q.gather(-1, ids), log_p.to(log_q), rest)
    return reduce(divergence.items(found), mask=mask, weights=weights, reduction=reduction)


def outcomes(log_q: Tensor, log_p: Tensor, rest: Tensor | None) -> Pair:
    """The pair of distributions over the K tokens and the tail, or over the K tokens alone.

    Args:
        log_q: the student's log-probabilities [..., K] of the teacher's tokens.
        log_p: the teacher's; -inf where there is no token.
        rest: what the student gives to all other tokens, [..., 1]; None = there is no tail.
    """
    lost = log_q.isinf() | log_p.isinf()
    log_q, log_p = log_q.masked_fill(lost, -torch.inf), log_p.masked_fill(lost, -torch.inf)
    if rest is None:
        return seen(log_q.log_softmax(-1), log_p.log_softmax(-1), lost)
    none, least = rest <= 0, torch.finfo(log_p.dtype).tiny
    rest_p = -torch.expm1(log_p.logsumexp(-1, keepdim=True).clamp(max=0))
    log_rest = torch.cat([torch.where(none, 1, rest).log(), rest_p.clamp(min=least).log()], dim=-1)
    return seen(
        torch.cat([log_q, log_rest[..., :1]], dim=-1),
        torch.cat([log_p, log_rest[..., 1:]], dim=-1),
        torch.cat([lost, none], dim=-1),
    )


def same_positions(student: Tensor, teacher: TopTokens) -> None:
    """Raise ``ShapeError`` unless ids and log-probabilities are of the student's positions."""
    ids, log_probs = teacher.ids.shape, teacher.log_probs.shape
    if ids != log_probs or ids[:-1] != student.shape[:-1]:
        raise ShapeError(
            f"the teacher's top tokens are ids {list(ids)} and log-probabilities {list(log_probs)}, but the "
            f"student has positions {list(student.shape[:-1])}: give both as [..., K] of the same positions"
        )
