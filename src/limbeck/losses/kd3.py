"""KD3: which samples of a foreign pool count, and the features that are matched on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape

UNTIL = 120  # of the paper's 240 epochs
PAIR_EPSILON = 1e-6  # added to each difference, as torch's PairwiseDistance does
VARIANCE_EPSILON = 1e-6


def alpha_schedule(epoch: int, until: int = UNTIL) -> float:
    """The teacher's share in the mixed prediction: 1 - exp(-5 ((e + 1) / (4/3 · until) - 1)²), then 0.

    Args:
        epoch: e, counted from 1.
        until: the epoch from which on the student decides alone; half of all epochs in the paper.

    Returns:
        In (0, 1), falling, before ``until``; 0 from there on (a jump).

    Source: Tang et al., ICCV 2023 (arXiv 2307.11469), official code: 160 and 120 of 240 epochs.
    """
    if epoch >= until:
        return 0.0
    return 1 - math.exp(-5 * ((epoch + 1) / (4 / 3 * until) - 1) ** 2)


def select_instances(
    student: Tensor, teacher: Tensor, alpha: float, cut: float = 0.95
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the samples of which the mix of both networks' logits is sure enough for its class.

    The classes' thresholds follow how often each is predicted: b_k = count_k / largest count, cutoff_k =
    cut · b_k / (2 - b_k).

    Args:
        student: logits [N, C].
        teacher: logits [N, C].
        alpha: the teacher's share of the mixed logits, in [0, 1].
        cut: the cutoff of the most frequent class.

    Returns:
        (keep [N] bool, confidence [N], predicted class [N], cutoff [C]).

    Raises:
        ShapeError: the two differ in shape.

    Source: Tang et al., ICCV 2023 (arXiv 2307.11469), official code.
    """
    same_shape("logits", student, teacher)
    mixed = alpha * full_precision(teacher) + (1 - alpha) * full_precision(student)
    confidence, said = mixed.softmax(1).max(1)
    counts = F.one_hot(said, mixed.shape[1]).sum(0)
    often = counts / counts.max()
    cutoff = cut * often / (2 - often)
    return confidence > cutoff[said], confidence, said, cutoff


def disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    """sigmoid(‖s - t + 1e-6‖₂) of logits [B, C]: [B], 0.5 where both agree and up to 1; detached.

    Source: Tang et al., ICCV 2023, official code.
    """
    difference = full_precision(student.detach()) - full_precision(teacher.detach())
    return torch.sigmoid(torch.linalg.vector_norm(difference + PAIR_EPSILON, dim=-1))


def weighted_feature_loss(
    student: Tensor,
    teacher: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over elements of w (student - teacher)², with w the samples' disagreement.

    Args:
        student: projected features [B, ...].
        teacher: features of the same shape; detached here.
        student_logits: [B, C], through the teacher's classifier.
        teacher_logits: [B, C].
        mask: True = counts, [B].
        weights: >= 0 [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``. It is not divided by the sum of the weights.

    Raises:
        ShapeError: features or logits differ in shape.

    Source: Tang et al., ICCV 2023, official code.
    """
    same_shape("features", student, teacher)
    same_shape("logits", student_logits, teacher_logits)
    error = (full_precision(student) - full_precision(teacher.detach())).square().flatten(1).mean(1)
    items = disagreement(student_logits, teacher_logits).to(error.dtype) * error
    return reduce(items, mask=mask, weights=weights, reduction=reduction)


def mix_distribution(images: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """Give each image a mix of its own channel statistics and those of another image.

    Args:
        images: x [B, C, H, W], normalised.
        share: lambda [B, 1, 1, 1] in [0, 1]: how much of its own mean and deviation an image keeps.
        order: the other image of each, a permutation [B].

    Returns:
        [B, C, H, W]: (x - mu) / sig · (l · sig + (1 - l) · sig') + l · mu + (1 - l) · mu', with l = lambda.

    Source: MixDistribution, Tang et al., ICCV 2023, official code: the unbiased variance, plus 1e-6.
    """
    mean = images.mean((2, 3), keepdim=True).detach()
    scale = (images.var((2, 3), keepdim=True) + VARIANCE_EPSILON).sqrt().detach()
    new_scale = share * scale + (1 - share) * scale[order]
    new_mean = share * mean + (1 - share) * mean[order]
    return (images - mean) / scale * new_scale + new_mean
