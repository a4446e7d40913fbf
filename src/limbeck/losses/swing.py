"""Distillation that keeps private strings back: a temperature for each token, and noise on its target."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ConfigError, unknown
from limbeck.losses.divergences import counted_rows
from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

StudentSide = Literal["same", "target_only"]

# The L1 distance of two distributions is at most 2: what noise on one has to hide.
SENSITIVITY = 2.0


def token_temperature(score: Tensor, t_low: float = 1.0, t_high: float = 10.0) -> Tensor:
    """t_low + (t_high - t_low) · score: [...] like ``score``.

    Args:
        score: how private the token is that the position predicts, in 0 .. 1, [...].
        t_low: temperature of a token that is not private, > 0.
        t_high: temperature of one that surely is, >= t_low.

    Raises:
        ConfigError: the temperatures are not such.

    Source: swing distillation (arXiv 2212.08349), after its abstract.
    Differs: the linear form is our reading; the paper's formula is not known to us.
    """
    if not 0 < t_low <= t_high:
        raise ConfigError(f"t_low is {t_low} and t_high {t_high}: allowed are 0 < t_low <= t_high")
    return t_low + (t_high - t_low) * full_precision(score)


def gaussian_noise(like: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation ``sigma`` >= 0 in the shape of ``like``, in full precision.

    Raises:
        ConfigError: ``sigma`` is below 0.
    """
    if not sigma >= 0:
        raise ConfigError(f"sigma is {sigma}: allowed are values from 0")
    return sigma * torch.empty_like(full_precision(like)).normal_(generator=generator)


def laplace_noise(like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 2 / epsilon in the shape of ``like``, in full precision.

    It is that of the Laplace mechanism for one token's distribution at the budget ``epsilon`` > 0. What a
    whole run gives away no figure here tells.

    Raises:
        ConfigError: ``epsilon`` is not above 0.

    Source: Dwork et al. 2006 (Calibrating noise to sensitivity), for a vector of L1 sensitivity 2.
    """
    if not epsilon > 0:
        raise ConfigError(f"epsilon is {epsilon}: allowed are budgets above 0")
    first, second = (
        torch.empty_like(full_precision(like)).exponential_(generator=generator) for _ in range(2)
    )
    return SENSITIVITY / epsilon * (first - second)  # the difference of two exponential ones is Laplace's


def soft_target(
    teacher: Tensor, temperature: Tensor, noise: Tensor | None = None, floor: float = 1e-12
) -> Tensor:
    """softmax(teacher / T), with noise on the probabilities, cut at ``floor`` and normalised.

    Args:
        teacher: logits [..., V]; detached here.
        temperature: T > 0 of each token [...].
        noise: [..., V]; None = none, and then nothing is cut.
        floor: the least probability before normalising, > 0.

    Returns:
        [..., V]; a distribution for any finite noise. NaN where the teacher's row is.

    Source: swing distillation (arXiv 2212.08349), after its abstract.
    Differs: that the noise enters as probability is our reading.
    """
    probs = (full_precision(teacher.detach()) / temperature.unsqueeze(-1)).softmax(-1)
    if noise is None:
        return probs
    raised = (probs + noise.detach()).clamp(min=floor)
    return raised / raised.sum(-1, keepdim=True)


def swing_loss(
    student: Tensor,
    teacher: Tensor,
    score: Tensor,
    *,
    noise: Tensor | None = None,
    t_low: float = 1.0,
    t_high: float = 10.0,
    student_side: StudentSide = "same",
    floor: float = 1e-12,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(noisy teacher at the token's temperature ‖ student), in nats, without T².

    At a high temperature the target is nearly even and, the student being divided by T as well, the gradient
    of that token falls as 1 / T². T² would undo just that: what remains is matching of logits, which hands
    the secret over whole. Cross entropy on the same tokens gives it away too: weight it by 1 - score.

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; detached here.
        score: how private the token is that the position PREDICTS, in 0 .. 1, [...].
        noise: on the teacher's probabilities [..., V], fresh each step; None = none.
        t_low: see ``token_temperature``.
        t_high: see ``token_temperature``.
        student_side: ``"same"`` divides the student by the token's temperature too, ``"target_only"`` by
            ``t_low``.
        floor: see ``soft_target``.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``; NaN where a counted row of the teacher is.

    Raises:
        ShapeError: the two differ in shape.
        ConfigError: wrong temperatures or an unknown ``student_side``.

    Source: swing distillation (arXiv 2212.08349), after its abstract.
    Differs: the formula is our reading of what the abstract fixes: score, temperature, noisy target, KL.
    """
    if student_side not in get_args(StudentSide):
        raise unknown("student_side", student_side, get_args(StudentSide))
    same_shape("logits", student, teacher)
    temperature = token_temperature(score, t_low, t_high)
    target = soft_target(teacher, temperature, noise, floor)
    divisor = temperature.unsqueeze(-1) if student_side == "same" else t_low
    log_p = F.log_softmax(full_precision(counted_rows(student, mask)) / divisor, dim=-1)
    log_p = log_p.masked_fill(target == 0, 0)  # a token that neither allows: 0 · -inf
    items = (torch.xlogy(target, target) - target * log_p).sum(-1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
