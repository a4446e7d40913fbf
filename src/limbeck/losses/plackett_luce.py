"""Plackett-Luce: how likely the student is to put the classes in a given order, choice after choice."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ShapeError, unknown
from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

Weighting = Literal["teacher", "first", "uniform", "position"]

# From this many classes on 2^(C - k) is too large for a loss in float32, and the places are normalised.
MANY = 60


def plackett_luce(
    student: Tensor,
    ranking: Tensor,
    places: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Σ_k w_k · (logsumexp(z_k, ..., z_C) - z_k), in nats; z are the student's logits in ranking order.

    Its k-th part is the negative log likelihood of choosing the k-th class of the ranking among those not yet
    chosen; the last is 0. Convex in the student's logits, which no temperature divides.

    Args:
        student: logits [..., C].
        ranking: class ids [..., C] int64, best first: a permutation of 0 .. C - 1 for each item.
        places: w >= 0, what each place of the ranking counts: [C], or [..., C]; detached here.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ShapeError: the ranking is not the logits' shape, or there is no item.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), appendix C; ListMLE: Xia et
    al., ICML 2008.
    """
    if student.shape != ranking.shape:
        raise ShapeError(
            f"logits are {list(student.shape)} but the ranking is {list(ranking.shape)}: rank every class of "
            "every item"
        )
    if student.numel() == 0:
        raise ShapeError(f"logits are {list(student.shape)}: give at least one item and one class")
    chosen = full_precision(student).gather(-1, ranking)
    left = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    surprise = (left - chosen)[..., :-1]  # the last choice is none
    items = (places.detach().to(chosen.dtype)[..., :-1] * surprise).sum(-1)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)


def teacher_ranking(teacher: Tensor, labels: Tensor) -> Tensor:
    """The classes best first: the true one, then the others by the teacher's logits, ties by class id.

    Args:
        teacher: logits [..., C].
        labels: true class [...] int64, in 0 .. C - 1.

    Returns:
        Class ids [..., C] int64. Where the teacher is NaN the order means nothing: see ``pld``.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), appendix C.
    """
    first = F.one_hot(labels, teacher.shape[-1]).bool()
    scores = full_precision(teacher.detach()).masked_fill(first, torch.inf)
    return scores.argsort(dim=-1, descending=True, stable=True)


def fixed_places(weighting: Weighting, classes: int) -> Tensor:
    """What each place of a ranking of C classes counts, best first: [C] float64.

    ``first``: (1, 0, ..., 0), which is cross entropy. ``uniform``: 1/C, which is ListMLE. ``position``:
    2^(C - k) - 1 for k = 1 .. C, position-aware ListMLE.

    Raises:
        ConfigError: a weighting that is unknown, or the teacher's (which is no fixed one).

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), section 4.2.
    Differs: above 60 classes ``position`` is divided by its sum, or it would overflow float32.
    """
    if weighting == "first":
        return F.one_hot(torch.tensor(0), classes).double()
    if weighting == "uniform":
        return torch.full((classes,), 1 / classes, dtype=torch.float64)
    if weighting == "position":
        place = torch.arange(1, classes + 1, dtype=torch.float64)
        shares = torch.exp2(-place) - 2.0**-classes
        return shares / shares.sum() if classes > MANY else 2.0**classes * shares
    raise unknown("weighting", weighting, [name for name in get_args(Weighting) if name != "teacher"])


def teacher_places(teacher: Tensor, ranking: Tensor, temperature: float) -> Tensor:
    """The teacher's softmax probability of the class at each place: [..., C], rows sum to 1.

    The true class keeps its own probability at the first place, however small.

    Args:
        teacher: logits [..., C].
        ranking: class ids [..., C].
        temperature: of these weights alone, > 0.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), appendix C.
    """
    return F.softmax(full_precision(teacher.detach()) / temperature, dim=-1).gather(-1, ranking)


def pld(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    weighting: Weighting = "teacher",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The Plackett-Luce loss of the ranking "true class first, then by the teacher", see ``plackett_luce``.

    For dense prediction give logits [B, H, W, C] and a mask of the labels that are not ignored.

    Args:
        student: logits [..., C].
        teacher: logits [..., C]; detached here. A NaN in it makes its item NaN, whatever the weighting.
        labels: true class [...] int64, in 0 .. C - 1; any number where the mask is False.
        temperature: of the teacher's weights, > 0; neither logits nor loss are scaled by it.
        weighting: ``teacher``: ``teacher_places``; else ``fixed_places``, divided by their sum.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape, or there is no item.
        ConfigError: an unknown weighting.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), appendix C.
    """
    same_shape("logits", student, teacher)
    if mask is not None:
        counts = mask.reshape(*mask.shape, *(1,) * (labels.ndim - mask.ndim)).bool()
        labels = torch.where(counts, labels, 0)
    ranking = teacher_ranking(teacher, labels)
    if weighting == "teacher":
        places = teacher_places(teacher, ranking, temperature)
    else:
        places = fixed_places(weighting, student.shape[-1]).to(student.device)
        places = places / places.sum().clamp(min=1)  # it is 0 for ``position`` with one class
        # A fixed weight does not see the teacher's numbers: without this a NaN would pass as some order.
        places = places + 0.0 * full_precision(teacher.detach()).sum(-1, keepdim=True)
    return plackett_luce(student, ranking, places, mask=mask, weights=weights, reduction=reduction)
