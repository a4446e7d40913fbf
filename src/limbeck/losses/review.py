"""The distances of knowledge review: pooled at several sizes for maps, plain for tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.hints import hint_mse
from limbeck.losses.reduction import full_precision


def hcl_stage(
    student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1), *, weights: Tensor | None = None
) -> Tensor:
    """Hierarchical context loss of one stage: MSE of the maps and of their pooled versions.

    The maps are pooled to l × l for each level below their height; the i-th level used weighs 2^-i, the maps
    themselves 1, and the sum is divided by the sum of the weights.

    Args:
        student: fused map [B, C, H, W].
        teacher: map [B, C, H, W]; detached here.
        levels: pooled sizes, largest first.
        weights: >= 0, [B].

    Returns:
        A scalar >= 0.

    Raises:
        ShapeError: the two differ in shape.

    Source: Chen et al., CVPR 2021 (arXiv 2104.09044), section 3.3, with the weights of the official code.
    """
    student, teacher = full_precision(student), full_precision(teacher.detach())
    loss, weight, total = hint_mse(student, teacher, weights=weights), 1.0, 1.0
    for level in levels:
        if level >= student.shape[2]:
            continue
        weight /= 2
        small, small_t = F.adaptive_avg_pool2d(student, level), F.adaptive_avg_pool2d(teacher, level)
        pooled = hint_mse(small, small_t, weights=weights)
        loss, total = loss + weight * pooled, total + weight
    return loss / total


def hcl(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    levels: Sequence[int] = (4, 2, 1),
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Hierarchical context loss: ``hcl_stage`` (see there) summed over stages."""
    stages = [hcl_stage(s, t, levels, weights=weights) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(stages).sum()


def token_review(
    students: Sequence[Tensor], teachers: Sequence[Tensor], *, weights: Tensor | None = None
) -> Tensor:
    """Mean over blocks of the MSE between fused student tokens and teacher tokens.

    Args:
        students: fused tokens, each [B, T, D].
        teachers: block outputs, each [B, T, D]; detached here.
        weights: >= 0, [B].

    Returns:
        A scalar >= 0.

    Raises:
        ShapeError: a pair differs in shape.

    Source: Zhang, Guo, Xiang 2024 (arXiv 2407.13911), official code, models/zoo.py: knowledge review for
    transformers.
    """
    return torch.stack(
        [hint_mse(s, t, weights=weights) for s, t in zip(students, teachers, strict=True)]
    ).mean()
