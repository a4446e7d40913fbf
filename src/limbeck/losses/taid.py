"""TAID: a target between the student and the teacher that moves from the one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.losses.divergences import Divergence, Pair, pair_of

TINY = 1e-15  # keeps the relative drop of a loss of 0 finite


@dataclass(frozen=True, eq=False)
class TAID(Divergence):
    """-Σ p_t log q with p_t = softmax((1 - t) · stopgrad(student) + t · teacher), the logits mixed.

    At t = 1 it is the cross entropy of forward KL; at t = 0 the student's entropy, without gradient.

    Attributes:
        t: in [0, 1]: a number, or a tensor without axes.
        cross_entropy: leave the target's entropy in; False is KL(p_t‖q), which has the same gradient.

    Source: Shing et al., ICLR 2025 (arXiv 2501.16937), eq. 2 and 3.
    Differs: the paper writes KL(p_t‖q); the value here is the official code's, which ``taid_update`` reads.
    """

    t: float | Tensor = 0.4
    cross_entropy: bool = True

    def items(self, pair: Pair) -> Tensor:
        """See ``Divergence.items``."""
        log_target = kept(self.target(pair).log_softmax(-1), pair)
        gap = -pair.log_q if self.cross_entropy else log_target.nan_to_num(neginf=0.0) - pair.log_q
        return (log_target.exp() * gap).sum(-1)

    def slope(self, pair: Pair) -> Tensor:
        """See ``Divergence.slope``."""
        return kept(self.target(pair).softmax(-1), pair).neg_()

    def target(self, pair: Pair) -> Tensor:
        """Logits of p_t: a softmax does not see that these were logits once, and are logarithms now."""
        log_q = pair.log_q.detach()
        mixed = log_q + self.t * (pair.log_p - log_q)
        return mixed if pair.lost is None else mixed.masked_fill(pair.lost, -torch.inf)


def kept(values: Tensor, pair: Pair) -> Tensor:
    """``values`` with 0 where something is lost: a softmax of lost tokens alone is NaN."""
    return values if pair.lost is None else values.masked_fill(pair.lost, 0)


def intermediate(student: Tensor, teacher: Tensor, t: float | Tensor) -> Tensor:
    """p_t = softmax((1 - t) · student + t · teacher), detached: [..., V].

    Args:
        student: logits [..., V].
        teacher: logits [..., V].
        t: in [0, 1].

    Source: Shing et al., ICLR 2025 (arXiv 2501.16937), eq. 2.
    """
    return TAID(t).target(pair_of(student.detach(), teacher)).softmax(-1)


class TAIDState(NamedTuple):
    """What TAID remembers from step to step; tensors without axes, so that a checkpoint has them.

    Attributes:
        t: how far the target is on its way to the teacher.
        momentum: moving average of the relative drop of the loss; 0 at first.
        previous: the loss of the step before; +inf at first.
        step: α · sigmoid(momentum) · (1 - t), by how much the last update wanted to move t.
        refused: updates that were not made because the loss was not finite.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor
    step: Tensor
    refused: Tensor

    @classmethod
    def begin(cls, t: float = 0.4) -> TAIDState:
        """The state before the first step."""
        zero = torch.zeros((), dtype=torch.float32)
        return cls(zero + t, zero, zero + torch.inf, zero, torch.zeros((), dtype=torch.int64))


def taid_update(
    state: TAIDState,
    loss: Tensor,
    step: int,
    steps: int,
    *,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
    adaptive: bool = True,
    counted: Tensor | int = 1,
) -> TAIDState:
    """The state after a step whose loss, computed with the state's t, was ``loss``.

    δ = (previous - loss) / previous; momentum <- β momentum + (1 - β) δ; t <- t +
    α sigmoid(momentum) (1 - t), at least the line from t_start to t_end, and at most t_end. The first loss is
    only remembered.

    Args:
        state: before; ``TAIDState.begin(t_start)`` at first.
        loss: a scalar: the cross entropy of ``TAID``, averaged over devices. A loss that is not finite
            changes nothing but ``refused``.
        step: optimiser steps made so far.
        steps: optimiser steps of the whole training.
        t_start: where t starts; 0.4 for Phi-3 to TinyLlama, 0.2 in the other scripts.
        t_end: where t ends.
        alpha: step size α of t.
        beta: momentum β.
        adaptive: False = t is the line.
        counted: tokens that the loss is the mean of; with 0 nothing is changed.

    Source: Shing et al., ICLR 2025 (arXiv 2501.16937), section 3.3 and algorithm 1.
    Differs: losses that are not finite, and those of no token, are refused.
    """
    value = loss.detach().to(state.t)
    drop = (state.previous - value) / (state.previous + TINY)
    momentum = beta * state.momentum + (1 - beta) * drop
    change = alpha * torch.sigmoid(momentum) * (1 - state.t)
    line = t_start + (t_end - t_start) * step / steps
    moved = (state.t + change).clamp(min=line).clamp(max=t_end) if adaptive else torch.full_like(value, line)
    finite, some = value.isfinite(), torch.as_tensor(counted, device=value.device) > 0
    known = finite & some & state.previous.isfinite()
    return TAIDState(
        t=torch.where(known, moved, state.t),
        momentum=torch.where(known, momentum, state.momentum),
        previous=torch.where(finite & some, value, state.previous),
        step=torch.where(known, change, state.step),
        refused=state.refused + (some & ~finite),
    )
