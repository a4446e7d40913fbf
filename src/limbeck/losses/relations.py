"""Relations between the samples of a batch: similarities, distances, angles.

Each comes whole, [N, N] or [N, N, N] for N samples, and as a loss that goes over the samples in parts. More
than one part are computed again in the backward pass, so that memory does not grow with the number of parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.errors import ShapeError
from limbeck.losses.hints import hint_mse
from limbeck.losses.reduction import SMALL, Reduction, full_precision, product, reduce

ENTRIES = 2**22  # of the largest tensor of a part; with fewer, small batches would be taken apart
CLOSEST = 1e-12  # the least squared distance of two samples: the root of 0 has no gradient
ALL = slice(None)


def similarities(features: Tensor, rows: slice = ALL) -> Tensor:
    """Products of the samples ``rows`` with all samples, each row of length 1: [R, N].

    Args:
        features: [N, ...].

    Source: Tung and Mori, ICCV 2019 (arXiv 1907.09682), eq. 2 and 3.
    """
    x = full_precision(features).flatten(1)
    if rows != ALL:
        return F.normalize(product(x[rows], x.mT), dim=1)
    if x.requires_grad and x.numel() > SMALL:
        return F.normalize(Gram.apply(x), dim=1)  # type: ignore[no-untyped-call]
    return F.normalize(product(x, x.mT), dim=1)


class Gram(torch.autograd.Function):
    """The products [N, N] of all samples [N, D] with each other, whose gradient is one product, not two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return product(x, x.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return product(grad + grad.mT, x)


def distances(features: Tensor, rows: slice = ALL) -> Tensor:
    """Euclidean distances of the samples ``rows`` to all samples: [R, N], 0 between a sample and itself.

    Args:
        features: [N, D].
    """
    x = full_precision(features)
    x = x - x.mean(0).detach()  # changes no distance, but leaves fewer digits to cancel
    squares = x.square().sum(1)
    found = squares[rows, None] + squares - 2 * product(x[rows], x.mT)
    place = torch.arange(len(x), device=x.device)
    return found.clamp(min=CLOSEST).sqrt().masked_fill(place[rows, None] == place, 0.0)


def angles(features: Tensor, rows: slice = ALL) -> Tensor:
    """Cosines [R, N, N] of the angles at the samples ``rows`` between the directions to every two samples.

    Args:
        features: [N, D].
    """
    x = full_precision(features)
    sides = F.normalize(x - x[rows, None], dim=2)
    return product(sides, sides.mT)


def similarity_relations(
    student: Tensor,
    teacher: Tensor,
    *,
    rows: int | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference of the similarities of both networks, over all pairs of samples.

    Positive factors and rotations of either network's features change nothing. An item is a sample: its
    similarities to all of the batch.

    Args:
        student: features [N, ...].
        teacher: features [N, ...] of the same samples; detached here.
        rows: samples of one part; None = as many as memory is meant for; N or more = all at once.
        weights: >= 0, [N].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [N] with ``reduction="none"``.

    Raises:
        ShapeError: the features are of different samples.

    Source: Tung and Mori, ICCV 2019 (arXiv 1907.09682), eq. 4.
    """
    count = _same_samples(student, teacher)
    other, rows = teacher.detach(), rows or ENTRIES // max(count, 1)
    if rows >= count:
        return hint_mse(similarities(student), similarities(other), weights=weights, reduction=reduction)

    def items(part: slice) -> Tensor:
        return hint_mse(similarities(student, part), similarities(other, part), reduction="none")

    return reduce(_in_parts(items, count, rows), weights=weights, reduction=reduction)


def distance_relations(
    student: Tensor,
    teacher: Tensor,
    *,
    rows: int | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Huber loss (threshold 1) of the distances of both networks, each divided by its mean over the batch.

    The mean runs over pairs of different samples, and the student's is differentiated through. Translation,
    rotation and positive factors of either network's features change nothing.

    Args:
        student: features [N, D_s].
        teacher: features [N, D_t] of the same samples; detached here.
        rows, weights, reduction: see ``similarity_relations``.

    Returns:
        >= 0: a scalar, or [N] with ``reduction="none"``; 0 for one sample.

    Raises:
        ShapeError: the features are of different samples, or no vectors.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068), eq. 6 to 8.
    """
    count = _same_samples(student, teacher, vectors=True)
    other, rows = teacher.detach(), rows or ENTRIES // max(count, 1)

    def mean(total: Tensor) -> Tensor:
        return (total / max(count * (count - 1), 1)).clamp(min=CLOSEST)

    if rows >= count and weights is None and reduction == "mean":  # the same with each distance taken once
        own, wanted = distances(student), distances(other)
        return F.smooth_l1_loss(own / mean(own.sum()), wanted / mean(wanted.sum()))
    scale, scale_t = (
        mean(_in_parts(lambda part, x=x: distances(x, part).sum(1), count, rows).sum())  # type: ignore[misc]
        for x in (student, other)
    )

    def items(part: slice) -> Tensor:
        own, wanted = distances(student, part) / scale, distances(other, part) / scale_t
        return F.smooth_l1_loss(own, wanted, reduction="none").mean(1)

    return reduce(_in_parts(items, count, rows), weights=weights, reduction=reduction)


def angle_relations(
    student: Tensor,
    teacher: Tensor,
    *,
    rows: int | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Huber loss (threshold 1) of the cosines of the angles of all triples of samples, of both networks.

    Translation, rotation and positive factors of either network's features change nothing. The time grows
    with N³, the memory with N² times the samples of a part. An item is a sample: all angles at it.

    Args:
        student: features [N, D_s].
        teacher: features [N, D_t] of the same samples; detached here.
        rows, weights, reduction: see ``similarity_relations``.

    Returns:
        >= 0: a scalar, or [N] with ``reduction="none"``.

    Raises:
        ShapeError: the features are of different samples, or no vectors.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068), eq. 9 and 10.
    """
    count = _same_samples(student, teacher, vectors=True)
    other = teacher.detach()

    def items(part: slice) -> Tensor:
        own, wanted = angles(student, part), angles(other, part)
        return F.smooth_l1_loss(own, wanted, reduction="none").mean((1, 2))

    entries = count * max(count, student.shape[1], teacher.shape[1], 1)
    rows = rows or ENTRIES // max(entries, 1)
    if rows >= count and weights is None and reduction == "mean":  # the same in one step
        return F.smooth_l1_loss(angles(student), angles(other))
    return reduce(_in_parts(items, count, rows), weights=weights, reduction=reduction)


def _in_parts(items: Callable[[slice], Tensor], count: int, rows: int) -> Tensor:
    """``items`` of all samples [N], ``rows`` of them at a time; parts are not kept for the backward pass."""
    rows = max(rows, 1)
    if rows >= count:
        return items(ALL)
    parts = (slice(start, start + rows) for start in range(0, count, rows))
    return torch.cat([checkpoint(items, p, use_reentrant=False, preserve_rng_state=False) for p in parts])


def _same_samples(student: Tensor, teacher: Tensor, *, vectors: bool = False) -> int:
    ranks = {student.ndim, teacher.ndim}
    if len(student) != len(teacher) or min(ranks) < 2 or (vectors and ranks != {2}):
        form = "vectors [N, D]" if vectors else "features [N, ...]"
        raise ShapeError(
            f"the student's feature is {list(student.shape)} but the teacher's is {list(teacher.shape)}: "
            f"give {form} of the same samples"
        )
    return len(student)
