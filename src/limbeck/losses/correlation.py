"""DIST: correlation instead of equality, between classes and between samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import full_precision, reduce, same_shape

# Added to the product of the norms, as the official code does: a row or column without spread correlates 0.
EPS = 1e-8


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """tau² · (1 - Pearson correlation) of the class distributions, by item and by class.

    The first part compares what each item says about the classes (the paper's inter-class relation), the
    second what each class gets from the items (intra-class relation). With one item the second is tau².

    Args:
        student: logits [..., C].
        teacher: logits [..., C]; detached here.
        temperature: tau > 0.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes. The intra-class part takes weighted correlations, and
            carries the mean weight.

    Returns:
        (inter, intra), each a scalar in 0 .. 2 tau² where weights are 1.

    Raises:
        ShapeError: the two differ in shape.

    Source: Huang et al., NeurIPS 2022 (arXiv 2205.10536); tau² and 1e-8 as in the official
    classification code.
    """
    same_shape("logits", student, teacher)
    p = F.softmax(full_precision(student) / temperature, dim=-1)
    q = F.softmax(full_precision(teacher.detach()) / temperature, dim=-1)
    gap = 1 - pearson(p, q)
    inter = reduce(gap, mask=mask, weights=weights)
    columns = p.flatten(0, -2).mT, q.flatten(0, -2).mT
    if mask is None and weights is None:
        intra = (1 - pearson(*columns)).mean()
    else:
        ones = torch.ones_like(gap)
        share = reduce(ones, mask=mask, weights=weights, reduction="none").flatten()
        mean_weight = reduce(ones, mask=mask, weights=weights)
        intra = (1 - pearson(*columns, share)).mean() * mean_weight
    return temperature**2 * inter, temperature**2 * intra


def pearson(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Correlation of ``a`` [..., n] and ``b`` [..., n] along the last axis: [...] in -1 .. 1.

    Args:
        weights: >= 0, [n]: how much each of the n pairs counts; one of weight 0 may be NaN. None = alike.

    Returns:
        0 where either does not vary.
    """
    if weights is None:
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    else:
        a, b = _centred(a, weights), _centred(b, weights)
    lengths: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / (lengths + EPS)


def _centred(x: Tensor, weights: Tensor) -> Tensor:
    x = torch.where(weights > 0, x, torch.zeros_like(x))
    mean = (weights * x).sum(-1, keepdim=True) / weights.sum().clamp(min=EPS)
    return weights.sqrt() * (x - mean)
