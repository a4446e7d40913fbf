"""Mean squared error between two sides that both learn."""

from __future__ import annotations

from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape


def mutual_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over elements of (student - teacher)², with a gradient to both: neither is detached.

    Args:
        student: [B, ...].
        teacher: [B, ...].
        mask: True = counts, [B].
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.
    """
    same_shape("the state", student, teacher)
    items = (full_precision(student) - full_precision(teacher)).square().flatten(1).mean(1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
