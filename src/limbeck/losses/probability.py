"""Squared error between class probabilities."""

from __future__ import annotations

from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape


def probability_mse(
    student: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over classes of (softmax(student) - target)².

    Args:
        student: logits [..., C].
        target: probabilities [..., C]; detached here.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        In [0, 2 / C] for one item: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), official code.
    Differs: none; other losses here sum over classes, this one takes the mean over them as that code does.
    """
    same_shape("probabilities", student, target)
    items = (full_precision(student).softmax(-1) - full_precision(target.detach())).square().mean(-1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
