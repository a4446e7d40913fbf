"""Rows that do not count, taken out before anything is computed from them."""

from __future__ import annotations

from torch import Tensor

from limbeck.errors import ShapeError


def blank(logits: Tensor, mask: Tensor | None) -> Tensor:
    """``logits`` with zeros in the rows that do not count.

    ``reduce`` drops what such rows give, but a NaN in them would still reach the gradient as 0 · NaN. Zeros
    are an ordinary row, and its gradient is exactly 0.

    Args:
        logits: [..., V].
        mask: True = counts, shape [...] or its leading axes; None = all count.

    Raises:
        ShapeError: a mask that does not lead the rows' shape.
    """
    if mask is None:
        return logits
    if mask.ndim >= logits.ndim or mask.shape != logits.shape[: mask.ndim]:
        raise ShapeError(
            f"mask is {list(mask.shape)} but must lead the rows' shape {list(logits.shape[:-1])}: give one "
            "value per sample, or one per row"
        )
    uncounted = ~mask.bool().reshape(*mask.shape, *(1,) * (logits.ndim - mask.ndim))
    return logits.masked_fill(uncounted, 0)
