"""Cross entropy and logit distillation with one weight between them."""

from __future__ import annotations

from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.losses.kl import kl_divergence
from limbeck.losses.labels import cross_entropy
from limbeck.losses.reduction import Reduction


def pruned_kd_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    alpha: float,
    temperature: float = 4.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """(1 - alpha) · CE(student, labels) + alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)).

    At ``alpha`` 0 the teacher is not read, at 1 the labels are not.

    Args:
        student: logits [..., C].
        teacher: logits [..., C], detached here; None where ``alpha`` is 0.
        labels: class ids [...] int64 in 0 .. C - 1.
        alpha: weight of the teacher's part, in [0, 1].
        temperature: T > 0.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ConfigError: ``alpha`` is out of range, or above 0 without a teacher.
        ShapeError: the two differ in shape.

    Source: Ben-Baruch et al., ICML 2025 (arXiv 2403.07854), the loss over the kept samples.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}: allowed are weights from 0 to 1")
    if alpha > 0 and teacher is None:
        raise ConfigError(f"alpha is {alpha} but there is no teacher: give its logits, or alpha 0")
    parts = []
    if alpha < 1:
        hard = cross_entropy(student, labels, mask=mask, weights=weights, reduction=reduction)
        parts.append((1 - alpha) * hard)
    if teacher is not None and alpha > 0:
        soft = kl_divergence(student, teacher, temperature, mask=mask, weights=weights, reduction=reduction)
        parts.append(alpha * soft)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
