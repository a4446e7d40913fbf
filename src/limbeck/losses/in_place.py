"""Values of a block of logits whose gradient, in closed form, takes the place of the logits.

Without a copy of the logits, each of them is read and written a few times only. The plain forms on whole
logits are the oracle: ``token_divergence``, ``top_divergence``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.divergences import Divergence, centred
from limbeck.losses.top_tokens import TopTokens, outcomes


def top_values(
    divergence: Divergence,
    logits: Tensor,
    teacher: TopTokens,
    temperature: float = 1.0,
    *,
    scale: Tensor | None,
    labels: Tensor | None = None,
    factors: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The cross entropies of the labels and the divergences [2, r], with their gradient in closed form.

    The softmax's exponentials and then the gradient are made in the logits' own place. The tail's slope is
    shared among its tokens by their probabilities.

    Args:
        divergence: which.
        logits: the student's [r, V]; overwritten, with the gradient of the sum of both by ``factors``, each
            row's times its ``scale``, where one is given.
        teacher: its top tokens.
        temperature: T > 0 of the divergence, and of the labels too.
        scale: [r, 1]; None = no gradient is asked for.
        labels: [r]; None = zeros are returned for them.
        factors: those of labels and divergence.
    """
    ids, log_p = teacher.ids, teacher.log_probs.detach().to(logits)
    known, least = ~log_p.isinf(), torch.finfo(logits.dtype).tiny
    logits = below_highest(logits, temperature)
    log_kept = logits.gather(-1, ids)
    log_label = None if labels is None else logits.gather(-1, labels[:, None])
    others = logits.exp_()
    kept = others.gather(-1, ids)
    others.scatter_add_(-1, ids, torch.where(known, -kept, 0))  # 0 at the teacher's tokens
    rest = others.sum(-1, keepdim=True)
    total = rest + torch.where(known, kept, 0).sum(-1, keepdim=True)
    log_total, kept, rest = total.log(), kept / total, rest / total
    found = outcomes(log_kept - log_total, log_p, rest if teacher.tail else None)
    cross = torch.zeros_like(rest) if log_label is None else log_total - log_label
    if scale is not None:
        by_labels, by_divergence = (factor / temperature for factor in factors)
        slope = divergence.slope(found)
        if teacher.tail:
            lever = slope.sum(-1, keepdim=True)
            spread = by_divergence * (slope[:, -1:] / rest.clamp(min=least) - lever)
            centre = by_divergence * (slope[:, :-1] - kept * lever)
        else:
            spread, centre = torch.zeros_like(rest), by_divergence * centred(slope, found.q)
        if labels is not None:
            spread, centre = spread + by_labels, centre + by_labels * kept
        most = torch.finfo(logits.dtype).max  # a tail of next to nothing asks for more
        others.mul_((spread * scale / total).clamp(-most, most))
        others.scatter_add_(-1, ids, torch.where(known, centre * scale, 0))
        if labels is not None:
            others.scatter_add_(-1, labels[:, None], -by_labels * scale)
    return torch.stack([cross[:, 0], divergence.items(found)])


def forward_kl(
    logits: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    scale: Tensor | None,
    labels: Tensor | None,
    factors: tuple[float, float],
) -> Tensor:
    """``top_values`` of forward KL where all of the teacher's logits [r, V] are known; overwritten too."""
    own, other = below_highest(logits, temperature), below_highest(teacher, temperature)
    log_label = None if labels is None else own.gather(-1, labels[:, None])
    q, p = own.exp(), other.exp()
    q_total, p_total = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    log_total = q_total.log()
    gap = torch.linalg.vecdot(p, other.sub_(own))[:, None] / p_total + (log_total - p_total.log())
    cross = torch.zeros_like(gap) if log_label is None else log_total - log_label
    if scale is not None:
        by_labels, by_divergence = (factor / temperature for factor in factors)
        spread = by_divergence if labels is None else by_divergence + by_labels
        torch.mul(q, spread * scale / q_total, out=logits)
        logits.addcmul_(p, by_divergence * scale / p_total, value=-1)
        if labels is not None:
            logits.scatter_add_(-1, labels[:, None], -by_labels * scale)
    return torch.cat([cross, gap], dim=-1).T


def below_highest(logits: Tensor, temperature: float) -> Tensor:
    """logits / T [r, V], in their own place, less the largest of their row."""
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    return logits if temperature == 1 else logits.div_(temperature)
