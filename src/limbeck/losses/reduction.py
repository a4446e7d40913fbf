"""What all losses share: the precision they compute in and how items become one number."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import ShapeError, unknown

Reduction = Literal["mean", "sum", "none"]
SMALL = 2**17  # elements up to which a gradient written by hand costs more to call than it saves


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it was float64."""
    return x if x.dtype == torch.float64 else x.float()


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """What is computed within keeps the precision of ``x``, also where autocast would take less."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the precision of both, also where autocast would take less."""
    with exactly(a):
        return a @ b


def reduce(
    items: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Turn one value per item into what ``reduction`` asks for.

    Args:
        items: [B], [B, T] or [B, H, W]: one loss value per item.
        mask: True = counts; the shape of ``items`` or of its leading axes. None = all count. What does not
            count is dropped, not multiplied by 0: a NaN there does no harm.
        weights: >= 0, the shape of ``items`` or of its leading axes. They scale the items and leave the
            divisor alone, so weights that sum to the number of items keep the loss's scale.
        reduction: ``"mean"`` divides the sum by the number of counted items (0 where none counts);
            ``"sum"`` leaves the divisor to the caller; ``"none"`` keeps the items, 0 where not counted.

    Returns:
        A scalar, or a tensor like ``items``.

    Raises:
        ShapeError: a mask or weights that do not lead the items' shape.
        ConfigError: an unknown reduction.
    """
    if reduction not in get_args(Reduction):
        raise unknown("reduction", reduction, get_args(Reduction))
    if weights is not None:
        items = items * leading("weights", weights, items).to(items.dtype)
    counted: Tensor | int = max(items.numel(), 1)
    if mask is not None:
        mask = leading("mask", mask, items).bool().expand_as(items)
        items = torch.where(mask, items, torch.zeros_like(items))
        counted = mask.sum().clamp(min=1)
    if reduction == "none":
        return items
    total = items.sum()
    return total if reduction == "sum" else total / counted


def same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    """Raise ``ShapeError`` unless the two tensors have one shape."""
    if student.shape != teacher.shape:
        raise ShapeError(
            f"{what} of the student is {list(student.shape)} but the teacher's is {list(teacher.shape)}: "
            "bring both to one shape"
        )


def leading(name: str, factor: Tensor, items: Tensor) -> Tensor:
    """``factor`` with axes of length 1 appended until it broadcasts against ``items``.

    Raises:
        ShapeError: its shape does not lead that of ``items``.
    """
    if factor.ndim > items.ndim or factor.shape != items.shape[: factor.ndim]:
        raise ShapeError(
            f"{name} is {list(factor.shape)} but must lead the items' shape {list(items.shape)}: "
            "give one value per sample, or one per item"
        )
    return factor.reshape(*factor.shape, *(1,) * (items.ndim - factor.ndim))
