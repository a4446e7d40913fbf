"""Universal logit distillation: other vocabularies, matched by their sorted probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses.divergences import counted_rows, log_distribution
from limbeck.losses.reduction import full_precision


def sorted_l1(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """Σ_k |q_(k) - p_(k)| of probabilities sorted downwards, the smaller vocabulary filled up with zeros.

    It sees no token's identity: permuting either vocabulary changes nothing.

    Args:
        student: logits [..., V_s].
        teacher: logits [..., V_t] at the matching positions; detached here.
        temperature: T > 0 of the student.
        teacher_temperature: T > 0 of the teacher.

    Returns:
        [...], in [0, 2].

    Raises:
        ShapeError: the two have other positions.

    Source: Boizard et al., TMLR 2025 (arXiv 2402.12030), eq. 5.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"logits of the student are {list(student.shape)} but the teacher's {list(teacher.shape)}: "
            "give [..., V_s] and [..., V_t] of the same positions"
        )
    q, p = (
        log_distribution(full_precision(z) / t).exp().sort(-1, descending=True).values
        for z, t in ((student, temperature), (teacher.detach(), teacher_temperature))
    )
    short = q.shape[-1] - p.shape[-1]
    return (F.pad(q, (0, max(-short, 0))) - F.pad(p, (0, max(short, 0)))).abs().sum(-1)


def uld(
    student: Tensor,
    teacher: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """``sorted_l1`` of the n-th counted position of both, up to the shorter answer: mean of texts of means.

    Args:
        student: logits [B, T_s, V_s], aligned with the labels.
        teacher: logits [B, T_t, V_t] of the same texts in its own tokens, aligned likewise; detached here.
        student_mask: True [B, T_s] where the student predicts a token of the answer.
        teacher_mask: the same [B, T_t] of the teacher.
        temperature: of the student.
        teacher_temperature: of the teacher.
        weights: >= 0 of the student's positions [B, T_s].

    Returns:
        A scalar, in [0, 2] without weights; texts without an answer on one side are left out; 0 where that
        is all of them.

    Raises:
        ShapeError: a mask that is not of its logits, or other texts.

    Source: Boizard et al., TMLR 2025 (arXiv 2402.12030), section 3.2; the official configuration
    (Nicolas-BZRD/llm-recipes) adds 1.5 of it to the cross entropy.
    Differs: the official code counts the positions of the answer from the first on, also over a masked token
    within it; and a text without an answer makes its mean NaN.
    """
    for logits, mask in ((student, student_mask), (teacher, teacher_mask)):
        if logits.ndim != 3 or logits.shape[:2] != mask.shape or len(student) != len(logits):
            raise ShapeError(
                f"a mask is {list(mask.shape)} but its logits {list(logits.shape)}: give [B, T] and "
                f"[B, T, V], with B = {len(student)} as the student has"
            )
    longest = min(student.shape[1], teacher.shape[1])
    own, own_count = _answers(student, student_mask, longest)
    other, other_count = _answers(teacher, teacher_mask, longest)
    count = torch.minimum(own_count, other_count)
    paired = torch.arange(longest, device=count.device) < count[:, None]
    items = sorted_l1(
        counted_rows(own, paired), counted_rows(other, paired), temperature, teacher_temperature
    )
    if weights is not None:
        items = items * _answers(weights[..., None], student_mask, longest)[0].squeeze(-1)
    means = torch.where(paired, items, 0).sum(1) / count.clamp(min=1)
    return means.sum() / (count > 0).sum().clamp(min=1)


def _answers(logits: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The logits [B, longest, V] of the first counted positions, and how many there are of them [B]."""
    order = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    places = order[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, places), mask.bool().sum(1)
