"""Speculative decoding without networks: the exact accept/reject step, and what acceptance is worth.

gamma tokens are proposed by the draft and verified by the target in one pass; V vocabulary. Temperature,
top-k and top-p must have been applied to the probabilities of both, the same way as where the draft drew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import ConfigError, DataError, ShapeError


class Verified(NamedTuple):
    """What one target pass leaves of a block.

    Attributes:
        n_accepted: how many proposals stay, [...] int64 in 0 .. gamma.
        next_token: the token that the target adds behind them, [...] int64.
        next_distribution: what it was drawn from, [..., V].
    """

    n_accepted: Tensor
    next_token: Tensor
    next_distribution: Tensor


class Acceptance(NamedTuple):
    """Proposals that the target judged.

    Attributes:
        alpha: the share that it accepted, in 0 .. 1.
        accepted: how many it accepted.
        rejected: how many it rejected: at most one per block.
    """

    alpha: float
    accepted: int
    rejected: int


def acceptance_probability(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Σ_v min(p_v, q_v) = 1 - TV(p, q): the chance that a token drawn from q is accepted.

    Args:
        target_probs: p [..., V].
        draft_probs: q [..., V].

    Returns:
        [...] in 0 .. 1.

    Source: Leviathan et al., ICML 2023 (arXiv 2211.17192), corollary 3.6.
    """
    return torch.minimum(target_probs, draft_probs).sum(-1)


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """max(0, p - q) as a distribution: where the token comes from that replaces a rejected one.

    Where nothing is left (p = q, so that nothing is ever rejected) it is p itself.

    Args:
        target_probs: p [..., V].
        draft_probs: q [..., V].

    Returns:
        [..., V]; sums to 1.

    Source: Leviathan et al., ICML 2023 (arXiv 2211.17192), section 2.3.
    """
    left = (target_probs - draft_probs).clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / torch.where(mass > 0, mass, 1), target_probs)


def speculative_verify(
    draft_probs: Tensor, target_probs: Tensor, draft_tokens: Tensor, u_accept: Tensor, u_final: Tensor
) -> Verified:
    """Accept proposals in order with probability min(1, p / q), and draw one token more.

    Behind the first rejection that token comes from ``residual``; where all are accepted it comes from the
    target's distribution behind the block. What is emitted is distributed exactly as the target alone would
    draw it. The drawn token is the first whose cumulated probability exceeds ``u_final``.

    Args:
        draft_probs: q [..., gamma, V], what each proposal was drawn from.
        target_probs: p [..., gamma + 1, V], at the same places and one behind the block.
        draft_tokens: the proposals [..., gamma] int64.
        u_accept: uniform in [0, 1), [..., gamma].
        u_final: uniform in [0, 1), [...].

    Raises:
        ShapeError: the shapes do not fit one another.
        DataError: a proposal has probability 0 under the draft's distribution; reading that stops the device.

    Source: Leviathan et al., ICML 2023 (arXiv 2211.17192), algorithm 1.
    Differs: a sum of the probabilities that is not quite 1 scales ``u_final``, so that no token of
    probability 0 is drawn by rounding.
    """
    _check(draft_tokens, target_probs)
    if draft_probs.shape != (*draft_tokens.shape, target_probs.shape[-1]):
        raise ShapeError(
            f"draft probabilities are {list(draft_probs.shape)} for proposals {list(draft_tokens.shape)} and "
            f"{target_probs.shape[-1]} target columns: give one row of the same vocabulary per proposal"
        )
    chosen = draft_tokens.unsqueeze(-1)
    q = draft_probs.gather(-1, chosen).squeeze(-1)
    p = target_probs[..., :-1, :].gather(-1, chosen).squeeze(-1)
    if bool((q <= 0).any()):
        raise DataError(
            "a proposal has probability 0 under the draft: pass the distributions that the draft drew from, "
            "after temperature and top-p"
        )
    accepted = _before_first(u_accept >= p / q)
    left = residual(target_probs[..., :-1, :], draft_probs)
    distributions = torch.cat([left, target_probs[..., -1:, :]], dim=-2)
    final = _row(distributions, accepted)
    return Verified(accepted, quantile(final, u_final), final)


def quantile(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The smallest token [...] whose cumulative probability exceeds its number.

    Args:
        probabilities: [..., V] >= 0; rows need not sum to exactly 1.
        uniform: [...] in [0, 1).
    """
    cumulative = probabilities.double().cumsum(-1)
    reached = uniform.double().unsqueeze(-1).to(cumulative.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, reached, right=True).squeeze(-1)


def greedy_verify(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Accept proposals as long as they are the target's own choice; then its choice follows.

    Args:
        draft_tokens: the proposals [..., gamma] int64.
        target_logits: [..., gamma + 1, V], at the places of the proposals and one behind the block.

    Returns:
        (n_accepted [...] int64 in 0 .. gamma, next_token [...] int64). Together they are what the target's
        greedy decoding gives, whatever the draft proposes. Of equal logits the lowest id is the choice.

    Raises:
        ShapeError: not one row of logits more than proposals.

    Source: the evaluation of AdaSPEC (arXiv 2510.19779), eq. 1 and 2.
    """
    _check(draft_tokens, target_logits)
    choice = target_logits.argmax(-1)
    accepted = _before_first(draft_tokens != choice[..., :-1])
    return accepted, choice.gather(-1, accepted.unsqueeze(-1)).squeeze(-1)


def acceptance_rate(accepted: Tensor, gamma: int | Tensor) -> Acceptance:
    """alpha = accepted / (accepted + rejected), over blocks.

    A block that did not accept all its proposals rejected one: those behind it were never judged and count
    as neither. The token that the target adds counts as neither too.

    Args:
        accepted: by block [N] int64, 0 .. gamma.
        gamma: proposals of a block, or of each block [N] where some were cut short.

    Raises:
        DataError: no proposal was judged, or a count lies outside 0 .. gamma.

    Source: AdaSPEC (arXiv 2510.19779), eq. 3.
    """
    outside = accepted[(accepted < 0) | (accepted > gamma)]
    if outside.numel():
        raise DataError(f"a block accepted {int(outside[0])} proposals: allowed are 0 up to those it made")
    kept, lost = int(accepted.sum()), int((accepted < gamma).sum())
    if kept + lost == 0:
        raise DataError("acceptance over 0 judged proposals: give at least one block")
    return Acceptance(kept / (kept + lost), kept, lost)


def block_efficiency(alpha: float, gamma: int) -> float:
    """tau = (1 - alpha^(gamma + 1)) / (1 - alpha): tokens per target pass, were acceptance independent.

    Args:
        alpha: chance of acceptance, in 0 .. 1.
        gamma: proposals of a block, >= 0.

    Returns:
        From 1 (alpha 0) to gamma + 1 (alpha 1).

    Raises:
        ConfigError: a value out of range.

    Source: Leviathan et al., ICML 2023 (arXiv 2211.17192), eq. 1; AdaSPEC (arXiv 2510.19779), eq. 4.
    Differs: summed as a geometric series, which needs no case for alpha 1.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ConfigError(
            f"alpha is {alpha} and gamma {gamma}: allowed are alpha from 0 to 1 and gamma from 0"
        )
    return float(sum(alpha**i for i in range(gamma + 1)))


def speedup(alpha: float, gamma: int, cost: float) -> float:
    """tau / (gamma · c + 1): wall-clock gain over decoding with the target alone.

    Args:
        alpha: chance of acceptance, in 0 .. 1.
        gamma: proposals of a block, >= 0.
        cost: c, time of one draft step over that of one target step, >= 0.

    Raises:
        ConfigError: a value out of range.

    Source: Leviathan et al., ICML 2023 (arXiv 2211.17192), theorem 3.8; AdaSPEC, eq. 5.
    """
    if not cost >= 0:
        raise ConfigError(f"cost is {cost}: allowed are ratios of times from 0")
    return block_efficiency(alpha, gamma) / (gamma * cost + 1)


def _before_first(stop: Tensor) -> Tensor:
    """How many places [...] of the last axis come before the first True; all where there is none."""
    return (~stop).long().cumprod(-1).sum(-1)


def _row(rows: Tensor, place: Tensor) -> Tensor:
    """``rows`` [..., n, V] at ``place`` [...]: [..., V]."""
    at = place[..., None, None].expand(*place.shape, 1, rows.shape[-1])
    return rows.gather(-2, at).squeeze(-2)


def _check(draft_tokens: Tensor, target: Tensor) -> None:
    if target.shape[:-1] != (*draft_tokens.shape[:-1], draft_tokens.shape[-1] + 1):
        raise ShapeError(
            f"the target has rows {list(target.shape[:-1])} for proposals {list(draft_tokens.shape)}: give "
            "one row per proposal and one behind the block"
        )
