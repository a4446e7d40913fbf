"""How far the student's distribution over the next token is from the teacher's: one table for all kernels.

Each divergence stands here twice: as a value, which autograd can differentiate, and as its slope in closed
form, from which the kernels of ``losses.chunked`` make the gradient without a graph. Symbols: p teacher, q
student, both softmax(logits / T) over the V tokens; natural logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.losses.reduction import Reduction, full_precision, leading, reduce, same_shape


class Pair(NamedTuple):
    """Two distributions over the same outcomes [..., V].

    Where ``lost`` is True, one of the two knows no finite logit: there all four numbers are 0, so that every
    divergence gets nothing from there, neither a value nor a slope nor a NaN.
    """

    q: Tensor
    log_q: Tensor
    p: Tensor
    log_p: Tensor
    lost: Tensor | None = None


@dataclass(frozen=True)
class Divergence:
    """A divergence of q from p. Those here have no state, and gradient never reaches p."""

    def items(self, pair: Pair) -> Tensor:
        """The value [...] at each position."""
        raise TypeError(f"{type(self).__name__} defines no items()")

    def slope(self, pair: Pair) -> Tensor:
        """u = q · dD/dq [..., V], as a new tensor; see ``centred``."""
        raise TypeError(f"{type(self).__name__} defines no slope()")

    def both(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """``items`` and ``slope`` at once; overridden where they share most of their work."""
        return self.items(pair), self.slope(pair)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p (log p - log q): the student must cover all that the teacher holds likely.

    Attributes:
        cross_entropy: leave the teacher's entropy in, -Σ p log q: another value, the same gradient.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; Agarwal et al., ICLR 2024 (arXiv
    2306.13649), section 2. The codes of MiniLLM, DistiLLM and TAID call the cross entropy forward KL.
    """

    cross_entropy: bool = False

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        gap = -pair.log_q if self.cross_entropy else pair.log_p - pair.log_q
        return (pair.p * gap).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return -pair.p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q (log q - log p): the student must not hold likely what the teacher does not.

    Source: Gu et al., ICLR 2024 (arXiv 2306.08543), eq. 1.
    """

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        return (pair.q * (pair.log_q - pair.log_p)).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return (pair.log_q - pair.log_p).add_(1).mul_(pair.q)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p - q|, in [0, 1]; its gradient is taken as 0 where the two are equal.

    Source: Wen et al., ACL 2023 (arXiv 2307.15190), section 3.
    """

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        return 0.5 * (pair.p - pair.q).abs().sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return 0.5 * pair.q * (pair.q - pair.p).sign()


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence β KL(p‖m) + (1 - β) KL(q‖m) with m = β p + (1 - β) q.

    Attributes:
        beta: β in [0, 1], the teacher's weight; DistiLLM's and MiniLLM's ``lam`` is 1 - β. By convention 0
            is forward and 1 reverse KL, though the limits of the value there are 0.
        normalised: divide by β (1 - β): then the two KLs are the limits.

    Raises:
        ConfigError: β outside [0, 1].

    Source: Agarwal et al., ICLR 2024 (arXiv 2306.13649), eq. 1.
    """

    beta: float = 0.5
    normalised: bool = False

    def __post_init__(self) -> None:
        _share("beta", self.beta)

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        if self.beta in (0, 1):
            return self._limit().items(pair)
        log_m = _log_mixture(pair, self.beta)
        own, other = pair.q * (pair.log_q - log_m), pair.p * (pair.log_p - log_m)
        return self._factor() * (self.beta * other + (1 - self.beta) * own).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return self.both(pair)[1]

    def both(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """See ``Divergence.both``: the slope's sum is the student's part of the value."""
        if self.beta in (0, 1):
            return self._limit().both(pair)
        log_m = _log_mixture(pair, self.beta)
        other = (pair.log_p - log_m).mul_(pair.p).sum(-1)
        slope = torch.sub(pair.log_q, log_m, out=log_m).mul_(pair.q).mul_(self._factor() * (1 - self.beta))
        return slope.sum(-1) + self._factor() * self.beta * other, slope

    def _limit(self) -> Divergence:
        return ReverseKL() if self.beta else ForwardKL()

    def _factor(self) -> float:
        return 1 / (self.beta * (1 - self.beta)) if self.normalised else 1.0


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p‖m) with m = α p + (1 - α) q: forward KL that never asks for a probability from nothing.

    Attributes:
        alpha: α in [0, 1), the teacher's weight in m; 0 is forward KL.
        cross_entropy: leave the teacher's entropy in, -Σ p log m, as the official code does.

    Raises:
        ConfigError: α outside [0, 1).

    Source: Ko et al., ICML 2024 (arXiv 2402.03898), section 3.1.
    """

    alpha: float = 0.1
    cross_entropy: bool = False

    def __post_init__(self) -> None:
        _share("alpha", self.alpha, one=False)

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        log_m = _log_mixture(pair, self.alpha)
        return (pair.p * (-log_m if self.cross_entropy else pair.log_p - log_m)).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        part = (pair.log_q - _log_mixture(pair, self.alpha)).exp_()  # q / m
        return part.mul_(pair.p).mul_(self.alpha - 1)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖m) with m = (1 - α) p + α q.

    Attributes:
        alpha: α in [0, 1), the student's weight in m; 0 is reverse KL.

    Raises:
        ConfigError: α outside [0, 1).

    Source: Ko et al., ICML 2024 (arXiv 2402.03898), section 3.1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _share("alpha", self.alpha, one=False)

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        return (pair.q * (pair.log_q - _log_mixture(pair, 1 - self.alpha))).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        gap = pair.log_q - _log_mixture(pair, 1 - self.alpha)
        return gap.sub_(gap.exp(), alpha=self.alpha).add_(1).mul_(pair.q)


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """(1 - λ) KL(p‖q) + λ KL(q‖p); at λ = ½ half of Jeffreys' divergence.

    Attributes:
        share: λ in [0, 1], the weight of reverse KL.

    Raises:
        ConfigError: λ outside [0, 1].

    Source: Jeffreys 1946; as a mixture: Ko et al., ICML 2024 (arXiv 2402.03898), official code, losses.py.
    Differs: that code takes the cross entropy for forward KL.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _share("share", self.share)

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        return (1 - self.share) * ForwardKL().items(pair) + self.share * ReverseKL().items(pair)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return ReverseKL().slope(pair).mul_(self.share).sub_(pair.p, alpha=1 - self.share)


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """w KL(p‖q) + (1 - w) KL(q‖p), where w is the share of Σ |p - q| that lies in the teacher's head.

    The head are the teacher's likeliest tokens whose probabilities add up to at most μ, and the likeliest in
    any case. No gradient goes through w.

    Attributes:
        mu: μ in [0, 1].

    Raises:
        ConfigError: μ outside [0, 1].

    Source: Wu et al., COLING 2025 (arXiv 2404.02657), section 4, and official code, AKL.py, which alone puts
    the likeliest token into the head in any case.
    Differs: w is ½ where p = q (the code gives 0/0).
    """

    mu: float = 0.5

    def __post_init__(self) -> None:
        _share("mu", self.mu)

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        w = self.head_weight(pair)
        return w * ForwardKL().items(pair) + (1 - w) * ReverseKL().items(pair)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        w = self.head_weight(pair).unsqueeze(-1)
        return ReverseKL().slope(pair).mul_(1 - w).sub_(w * pair.p)

    def head_weight(self, pair: Pair) -> Tensor:
        """w [...] in [0, 1]."""
        p, order = pair.p.sort(dim=-1, descending=True, stable=True)
        gap = (p - pair.q.detach().gather(-1, order)).abs()
        head = p.cumsum(-1) <= self.mu
        head[..., 0] = True
        all_gaps = gap.sum(-1)
        some = all_gaps > 0
        return torch.where(some, (gap * head).sum(-1) / torch.where(some, all_gaps, 1), 0.5)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "total_variation": TotalVariation,
    "jsd": JSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "symmetric_kl": SymmetricKL,
    "adaptive_kl": AdaptiveKL,
}


def token_divergence(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A divergence of the student's next token from the teacher's, from whole logits.

    T divides both and nothing is multiplied by T². For the mean over all devices and accumulation steps take
    ``reduction="sum"`` and divide by the number of tokens that count in all of them. For the mean over texts,
    not tokens, see ``sequence_weights``. A term whose student's or teacher's logit is infinite is 0, and an
    infinite logit, of either sign, takes no probability.

    Args:
        divergence: which.
        student: logits [..., V], aligned with the labels (nothing is shifted here).
        teacher: logits [..., V] of the same vocabulary; detached here.
        temperature: T > 0.
        mask: True = counts, shape [...] or its leading axes. What does not count may be NaN, on both sides.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        A scalar, or [...] with ``reduction="none"``, in nats.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape("logits", student, teacher)
    found = pair_of(counted_rows(student, mask), teacher, temperature)
    return reduce(divergence.items(found), mask=mask, weights=weights, reduction=reduction)


def pair_of(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Pair:
    """The distributions that logits [..., V] of both networks stand for; the teacher's are detached."""
    own, other = full_precision(student) / temperature, full_precision(teacher.detach()) / temperature
    lost = own.isinf() | other.isinf()
    return seen(log_distribution(own), log_distribution(other), lost)


def seen(log_q: Tensor, log_p: Tensor, lost: Tensor) -> Pair:
    """The pair of two distributions, given as logarithms, without what is ``lost``."""
    log_q, log_p = log_q.masked_fill(lost, 0), log_p.masked_fill(lost, 0)
    return Pair(log_q.exp().masked_fill(lost, 0), log_q, log_p.exp().masked_fill(lost, 0), log_p, lost)


def log_distribution(logits: Tensor) -> Tensor:
    """log softmax of logits [..., V]; an infinite one, of either sign, gets -inf."""
    return F.log_softmax(logits.masked_fill(logits.isinf(), -torch.inf), dim=-1)


def centred(slope: Tensor, q: Tensor) -> Tensor:
    """u - q · Σ u, in u's place: a slope [..., V] brought back through the softmax to logits / T."""
    return slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1)


def counted_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` [..., V] with 0 in the rows that do not count, so that no NaN of theirs comes back.

    Raises:
        ShapeError: the mask is not [...] or its leading axes.
    """
    if mask is None:
        return values
    mask = leading("mask", mask, values[..., 0]).bool().unsqueeze(-1)
    return torch.where(mask, values, torch.zeros_like(values))


def sequence_weights(sequence: Tensor, count: int) -> Tensor:
    """Weights [R] with which the mean over R tokens is the mean over texts of the mean over their tokens.

    Args:
        sequence: the text, in 0 .. count - 1, that each counted token is of: [R] int64.
        count: how many texts there are; those without a counted token are left out of the mean.

    Returns:
        > 0, with the sum R.
    """
    tokens = torch.zeros(count, device=sequence.device).index_add_(
        0, sequence, torch.ones(len(sequence), device=sequence.device)
    )
    share = len(sequence) / (tokens > 0).sum().clamp(min=1)
    return share / tokens[sequence]


def _log_mixture(pair: Pair, teacher: float) -> Tensor:
    """log of teacher · p + (1 - teacher) · q; where both underflow it only has to be finite."""
    if teacher in (0, 1):
        return pair.log_p if teacher else pair.log_q
    mixed = (teacher * pair.p).add_(pair.q, alpha=1 - teacher)
    return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny).log_()


def _share(name: str, value: float, *, one: bool = True) -> None:
    if not 0 <= value <= 1 or (value == 1 and not one):
        raise ConfigError(f"{name} is {value} but must lie in [0, 1{']' if one else ')'}: give a share")
