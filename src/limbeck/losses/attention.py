"""Attention transfer: where in a map the activity is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.hints import hint_mse
from limbeck.losses.maps import at_one_size
from limbeck.losses.reduction import SMALL, Reduction, full_precision


def attention(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a map is active: the mean over channels of |activation|^power, of length 1 over the positions.

    Args:
        features: [B, C, H, W].
        power: p >= 1.

    Returns:
        [B, H * W], each >= 0; a map that is 0 everywhere stays 0.

    Source: Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928), section 3.1.
    """
    x = full_precision(features)
    return F.normalize(_mean_power(x, power).flatten(1), dim=1)


def _mean_power(x: Tensor, power: float) -> Tensor:
    if power != 2:
        return x.abs().pow(power).mean(1)
    if x.requires_grad and x.numel() > SMALL:
        return MeanSquare.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    return x.square().mean(1)


class MeanSquare(torch.autograd.Function):
    """The mean over channels of the squares of [B, C, H, W], whose gradient is one product: 2 x / C."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        product: Tensor = x * (grad * (2 / x.shape[1])).unsqueeze(1)
        return product


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    power: float = 2.0,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over positions of the squared difference of both attention maps.

    The larger map is pooled to the size of the smaller one before its attention is taken. Positive factors of
    either map change nothing.

    Args:
        student: [B, C_s, H, W].
        teacher: [B, C_t, H', W']; detached here.
        power: p >= 1 of the attention.
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``.

    Raises:
        ShapeError: one is no map, or they are of different samples.

    Source: Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928), eq. 2.
    Differs: the mean of squares of the reference codes, whose weight is 1000, not a norm with weight β/2.
    """
    own, other = at_one_size(full_precision(student), full_precision(teacher.detach()))
    return hint_mse(attention(own, power), attention(other, power), weights=weights, reduction=reduction)
