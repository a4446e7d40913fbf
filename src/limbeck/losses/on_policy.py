"""What is learnt from texts that the student itself wrote: which tokens count, and MiniLLM's rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that does not count
DRAWN = "drawn"  # the mark of a written token: the log-probability with which it was drawn
LITTLE = 1e-4  # what a position that does not count adds to the length: the divisor of those behind the end


def on_policy_labels(
    prompt_mask: Tensor, generated: Tensor, end: int | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Attention mask and labels of prompts with what was generated behind them.

    Only what was generated counts, up to and with the first end; what stands behind that is not read either.
    Padding is known by the prompt's own mask, never by its id, which may be that of the end.

    Args:
        prompt_mask: 1 [B, P] where a token of the prompt is none of padding.
        generated: token ids [B, P + G], the prompts and what follows them.
        end: the id, or ids, that end a text; None = nothing does.

    Returns:
        (attention mask [B, P + G] int64, labels [B, P + G] int64 with -100 where nothing counts). The labels
        stand at their own positions: they are still to be shifted.

    Source: Agarwal et al., ICLR 2024 (arXiv 2306.13649), algorithm 1; TRL (huggingface/trl), GKD trainer.
    """
    length = prompt_mask.shape[1]
    answer = generated[:, length:]
    ends = torch.as_tensor([] if end is None else end, dtype=answer.dtype, device=answer.device)
    ended = torch.isin(answer, ends).long()
    alive = (ended.cumsum(1) - ended == 0).long()
    attention = torch.cat([prompt_mask.long(), alive], dim=1)
    labels = torch.where(attention.bool(), generated, IGNORED)
    labels[:, :length] = IGNORED
    return attention, labels


def minillm_reward(student_log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """r = log p - log q of the token that was drawn: what ``minillm_advantage`` adds up.

    Args:
        student_log_prob: log q [B, T] of the drawn tokens.
        teacher_log_prob: log p [B, T] of them.

    Returns:
        [B, T], without gradient.

    Source: Gu et al., ICLR 2024 (arXiv 2306.08543), eq. 2.
    """
    return (teacher_log_prob - student_log_prob).detach()


def minillm_advantage(
    reward: Tensor, mask: Tensor | None = None, *, gamma: float = 0.0, length_normalised: bool = True
) -> Tensor:
    """Σ_{i >= t} γ^(i-t) r_i, divided by the same sum of what counts: [B, T].

    The part of the gradient that concerns the next token alone is ``ReverseKL`` at each position, which
    sums over the vocabulary exactly.

    Args:
        reward: r [B, T], see ``minillm_reward``.
        mask: True [B, T] = counts; others have no reward, and add 1e-4 to the length. None = all count.
        gamma: γ in [0, 1]; 0 leaves r_t alone, which is TRL's default; the paper's is 1.
        length_normalised: whether to divide: without it short texts are preferred.

    Source: Gu et al., ICLR 2024 (arXiv 2306.08543), section 2.2.
    Differs: the paper's sum begins at t + 1, its official code's at t, as here. TRL (huggingface/trl) has
    γ^i for γ^(i-t), which is the same where it is divided by the length.
    """
    counts = torch.ones_like(reward) if mask is None else mask.to(reward.dtype)
    reward = torch.where(counts > 0, reward, 0)
    place = torch.arange(reward.shape[1], device=reward.device)
    ahead = (place[:, None] - place).clamp(min=0).to(reward.dtype)
    discount = torch.pow(gamma, ahead).tril()  # [i, t]
    total = reward @ discount
    return total / (counts.clamp(min=LITTLE) @ discount) if length_normalised else total


def adaptive_share(
    losses: Sequence[float], start: float = 0.0, *, rise: float = 0.1, tolerance: float = 0.1
) -> float:
    """The chance φ in [0, 1] that a student learns from its own texts, by how it does on texts held out.

    It begins at ``start`` and rises where the student gets worse: the data's texts alone no longer help it.

    Args:
        losses: L_0, L_1, ... of validation, in nats, so far; the first is taken before the training.
        start: φ until the first rise.
        rise: what a rise adds, up to 1.
        tolerance: ε that a loss must be above the last one that counted, the first or one of a rise.

    Returns:
        φ from now on.

    Source: Ko et al. (DistiLLM), ICML 2024 (arXiv 2402.03898), section 3.2 and official code, which compares
    with the loss at the last rise, not with the one just before.
    """
    share, before = start, losses[0]
    for loss in losses[1:]:
        if loss >= before + tolerance:
            share, before = min(share + rise, 1.0), loss
    return share
