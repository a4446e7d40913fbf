"""Temperature-scaled Kullback-Leibler divergence between class distributions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats.

    The sum runs over classes, the mean over counted items; T² keeps the gradient's size when T changes.
    With one class it is 0. A NaN in either stays a NaN.

    Args:
        student: logits [..., C].
        teacher: logits [..., C]; detached here.
        temperature: T > 0.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2.
    """
    same_shape("logits", student, teacher)
    log_p = F.log_softmax(full_precision(student) / temperature, dim=-1)
    log_q = F.log_softmax(full_precision(teacher.detach()) / temperature, dim=-1)
    if mask is None and weights is None and reduction == "mean":  # the same in fewer and larger steps
        total = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        return total * (temperature**2 / max(1, log_p[..., 0].numel()))
    items = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
