"""Contrast between two views of the same samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

EPSILON = 1e-12  # the least norm that a row is divided by


def nt_xent(
    one: Tensor,
    other: Tensor,
    temperature: float = 0.3,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Each row must find its other view among all rows of both views but itself, by cosine similarity.

    For each of the 2B rows -log(exp(s_pos / T) / Σ_{j ≠ self} exp(s_j / T)), in nats; a sample's value is the
    mean of its two rows. With one sample it is 0. The value does not change when rows are scaled, nor when
    the two views change places. Nothing is detached.

    Args:
        one: [B, D].
        other: [B, D], row by row another view of the same samples.
        temperature: T > 0.
        mask: True [B] = the sample's value counts; as a negative every row serves.
        weights: >= 0 [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.

    Source: NT-Xent, Chen et al., ICML 2020 (arXiv 2002.05709), eq. 1.
    """
    same_shape("views", one, other)
    count = len(one)
    rows = F.normalize(torch.cat([full_precision(one), full_precision(other)]), dim=1, eps=EPSILON)
    itself = torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    scores = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    positive = torch.arange(2 * count, device=rows.device).roll(count)
    items = F.cross_entropy(scores, positive, reduction="none").view(2, count).mean(0)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)
