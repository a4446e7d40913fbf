"""Teacher hacking: whether a student that comes nearer to its teacher moves away from the truth.

The truth is a model too, the oracle, from whose texts the teacher learnt. The golden metric is the student's
distance from the oracle, the proxy metric its distance from the teacher, both in nats per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import rel_entr
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError, ShapeError, unknown
from limbeck.losses.divergences import ForwardKL, ReverseKL, token_divergence

Kind = Literal["forward_kl", "reverse_kl", "jeffreys"]


def distances(
    reference: Tensor, student: Tensor, kind: Kind = "forward_kl", *, mask: Tensor | None = None
) -> Tensor:
    """How far the student's next token is from the reference's at each place, in nats.

    Args:
        reference: logits [..., V]; detached here.
        student: logits [..., V].
        kind: KL(reference ‖ student), KL(student ‖ reference), or ``jeffreys``: their sum.
        mask: True = counts, [...].

    Returns:
        [...] >= 0; 0 where it does not count.

    Raises:
        ConfigError: an unknown ``kind``.
        ShapeError: the two differ in shape.

    Source: Tiapkin et al. 2025 (arXiv 2502.02671).
    Differs: Jeffreys' divergence is the sum, without a factor of a half.
    """
    if kind not in get_args(Kind):
        raise unknown("kind", kind, get_args(Kind))
    parts = {
        "forward_kl": (ForwardKL(),),
        "reverse_kl": (ReverseKL(),),
        "jeffreys": (ForwardKL(), ReverseKL()),
    }
    found = [token_divergence(part, student, reference, mask=mask, reduction="none") for part in parts[kind]]
    return torch.stack(found).sum(0)


def sequence_distance(reference: Tensor, student: Tensor, mask: Tensor, kind: Kind = "forward_kl") -> Tensor:
    """The mean over texts of the sum of ``distances`` over their tokens, in nats per text.

    With texts drawn from the reference and ``forward_kl`` that is an unbiased estimate of the KL between the
    two laws of whole texts. Proxy: reference teacher, texts of the teacher. Golden: reference oracle, texts
    of the oracle, of the same prompts. Keep the texts fixed while a student is trained.

    Args:
        reference: logits [B, T, V]; detached here.
        student: logits [B, T, V].
        mask: True = a token of the answer, [B, T]; an answer without tokens counts 0.
        kind: see ``distances``.

    Returns:
        A scalar >= 0.

    Raises:
        ConfigError: an unknown ``kind``.
        ShapeError: the shapes do not fit one another.
        DataError: there are no texts.

    Source: Tiapkin et al. 2025 (arXiv 2502.02671), proxy and golden metrics.
    Differs: what the texts of a metric are drawn from is our reading.
    """
    if not len(reference):
        raise DataError("distance over 0 texts: give at least one")
    return distances(reference, student, kind, mask=mask).sum(-1).mean()


def chain_kl(
    p_start: ArrayLike, p_next: ArrayLike, q_start: ArrayLike, q_next: ArrayLike, length: int
) -> float:
    """KL(p ‖ q) between the texts of two first-order Markov models, exactly, in nats.

    Args:
        p_start: law of the first token [V].
        p_next: law of the next token after each [V, V], rows sum to 1.
        q_start: [V] of the other model.
        q_next: [V, V] of the other model.
        length: tokens of a text, >= 1.

    Raises:
        ShapeError: shapes that do not fit one another.
        ConfigError: ``length`` is below 1.

    Source: the chain rule of KL.
    """
    if length < 1:
        raise ConfigError(f"length is {length}: allowed are texts of at least 1 token")
    start, step, other_start, other_step = (
        np.asarray(x, dtype=np.float64) for x in (p_start, p_next, q_start, q_next)
    )
    size = start.shape[-1]
    if not start.shape == other_start.shape == (size,) or not step.shape == other_step.shape == (size, size):
        raise ShapeError(
            f"the chains have shapes {start.shape}, {step.shape}, {other_start.shape}, {other_step.shape}: "
            "give [V], [V, V] for both"
        )
    rows = rel_entr(step, other_step).sum(-1)
    total, law = float(rel_entr(start, other_start).sum()), start
    for _ in range(length - 1):
        stands = law > 0  # a token that never does adds nothing, even where its row is infinitely far
        total += float(law[stands] @ rows[stands])
        law = law @ step
    return total


@dataclass(frozen=True)
class HackingReport:
    """What the golden metric did while the proxy metric was trained down.

    Attributes:
        argmin: where golden was lowest, the first such place.
        rise: how far above that it ended, in nats per text.
        hacked: it ended more than the tolerance above it, and proxy ended below its value there.
    """

    argmin: int
    rise: float
    hacked: bool


def hacking_report(proxy: Sequence[float], golden: Sequence[float], tolerance: float) -> HackingReport:
    """Whether the student came nearer to its teacher while it went away from the truth.

    Args:
        proxy: distance from the teacher at each evaluation.
        golden: distance from the oracle at the same ones.
        tolerance: rise of golden that is noise, >= 0.

    Raises:
        ShapeError: they differ in number, or there are none.
        NonFiniteError: a value is not finite.
        ConfigError: ``tolerance`` is below 0.

    Source: Tiapkin et al. 2025 (arXiv 2502.02671), the U of the golden metric.
    Differs: the paper shows curves; this rule is our own.
    """
    near, true = np.asarray(proxy, dtype=np.float64), np.asarray(golden, dtype=np.float64)
    if near.shape != true.shape or near.ndim != 1 or not len(near):
        raise ShapeError(f"{near.size} proxy and {true.size} golden values: give one of each per evaluation")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}: allowed are values from 0")
    if not (np.isfinite(near).all() and np.isfinite(true).all()):
        raise NonFiniteError("a proxy or golden distance is not finite: mend the model that gave it")
    best = int(true.argmin())
    rise = float(true[-1] - true[best])
    return HackingReport(best, rise, rise > tolerance and bool(near[-1] < near[best]))


@dataclass(frozen=True)
class PowerLaw:
    """The straight line through a curve in log-log: log value = intercept + slope · log step.

    Attributes:
        slope: the exponent.
        intercept: log of the value at step 1.
        r2: share of the variance of log value that the line explains; 1 where there is none.
        max_residual: the largest distance of a log value from the line. A curve that leaves its line is the
            warning that needs no oracle.
    """

    slope: float
    intercept: float
    r2: float
    max_residual: float


def power_law(steps: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares of log value on log step.

    Args:
        steps: > 0, at least two that differ.
        values: > 0, one per step.

    Raises:
        ShapeError: they differ in number.
        DataError: a step or value is not above 0 and finite, or all steps are the same.

    Source: Tiapkin et al. 2025 (arXiv 2502.02671), detection without an oracle.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ShapeError(f"{x.size} steps and {y.size} values: give one value per step")
    if not (np.isfinite([x, y]).all() and (np.stack([x, y]) > 0).all() and len(set(x.tolist())) > 1):
        raise DataError(
            "steps and values must be finite and above 0, with two steps that differ: mend the curve"
        )
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    residuals = log_y - (intercept + slope * log_x)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / spread if spread > 0 else 1.0
    return PowerLaw(float(slope), float(intercept), r2, float(np.abs(residuals).max()))
