"""What a student with two heads learns from: labels with one head, a teacher with the other."""

from __future__ import annotations

from torch import Tensor

from limbeck.losses.kl import kl_divergence
from limbeck.losses.labels import cross_entropy


def dual_head(
    logits: Tensor,
    soft_logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    labelled: Tensor,
    temperature: float = 2.0,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the labelled samples, and T² · KL of the labelled and of the unlabelled ones.

    Each is the mean over its own samples, and 0 where there are none.

    Args:
        logits: of the head that learns the labels, [B, C].
        soft_logits: of the head that learns from the teacher, [B, C].
        teacher: logits [B, C]; detached here.
        labels: class ids [B] int64; those of unlabelled samples count for nothing.
        labelled: True [B] where the label may be read.
        temperature: T > 0.
        weights: >= 0, [B].

    Returns:
        (cross entropy, KL over labelled, KL over unlabelled), each >= 0.

    Raises:
        ShapeError: teacher and student differ in shape.

    Source: DHO (arXiv 2505.07675), official code, train_others.py.
    """
    return (
        cross_entropy(logits, labels, mask=labelled, weights=weights),
        kl_divergence(soft_logits, teacher, temperature, mask=labelled, weights=weights),
        kl_divergence(soft_logits, teacher, temperature, mask=~labelled, weights=weights),
    )
