"""Mean squared error between features of equal shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape


def hint_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over elements of (student - teacher)².

    An item is what ``mask`` or ``weights`` tell apart: a sample, or a token or pixel where they have as many
    axes. Its value is the mean over the axes that are left.

    Args:
        student: features [B, ...], already brought to the teacher's shape.
        teacher: features [B, ...]; detached here.
        mask: True = counts, shape of the leading axes of the features.
        weights: >= 0, shape of the leading axes of the features.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or one value per item with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.

    Source: Romero et al., ICLR 2015 (arXiv 1412.6550), eq. 3.
    Differs: the mean over elements of the common code, not half the squared norm.
    """
    same_shape("features", student, teacher)
    own, other = full_precision(student), full_precision(teacher.detach())
    if mask is None and weights is None and reduction == "mean" and own.numel():
        return F.mse_loss(own, other)
    error = (own - other).square()
    axes = max(1, mask.ndim if mask is not None else 1, weights.ndim if weights is not None else 1)
    items = error.flatten(axes).mean(-1) if error.ndim > axes else error
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
