"""Pseudo-subclasses of a teacher's classes: directions of its last embedding, and what they say of a sample.

N samples, D embedding width, C classes, S subclasses of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import DataError
from limbeck.losses.kl import kl_divergence
from limbeck.losses.reduction import Reduction, full_precision


def null_projector(weight: Tensor) -> Tensor:
    """I - W⁺W [D, D]: takes from an embedding all that the output layer ``weight`` [C, D] reads.

    Source: Loo et al. 2024 (arXiv 2409.20449), section 3.2.
    """
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    inverse: Tensor = torch.linalg.pinv(weight)
    return eye - inverse @ weight


def class_directions(features: Tensor, labels: Tensor, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Each class's mean [C, D] and its first ``count`` principal directions [C, count, D].

    The directions of a class are orthonormal and not scaled by how much varies along them; the largest
    entry of each is positive.

    Args:
        features: [N, D].
        labels: class ids [N] int64 in 0 .. C - 1.
        classes: C.
        count: S >= 1.

    Raises:
        DataError: a class has fewer than ``count`` + 1 samples.

    Source: Loo et al. 2024 (arXiv 2409.20449), section 3.1.
    Differs: the sign rule, without which the directions are not a function of the data.
    """
    means, directions = [], []
    for k in range(classes):
        own = features[labels == k]
        if len(own) <= count:
            raise DataError(
                f"class {k} has {len(own)} samples but {count} subclasses need at least {count + 1}: "
                "ask for fewer subclasses, or give more samples"
            )
        means.append(own.mean(0))
        rows = torch.linalg.svd(own - means[-1], full_matrices=False).Vh[:count]
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        directions.append(rows * largest.sign())
    return torch.stack(means), torch.stack(directions)


def positions(features: Tensor, projector: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Positions [N, C, S] of embeddings [N, D] along a class's directions [C, S, D] from its mean [C, D]."""
    away = (features @ projector.mT).unsqueeze(1) - mean
    return torch.einsum("ncd,csd->ncs", away, directions)


def subclass_log_probs(logits: Tensor, scores: Tensor, temperature: float = 1.0) -> Tensor:
    """log q [N, C, S] with q_cs = softmax(logits / T)_c · softmax over s of scores_cs.

    Args:
        logits: of the teacher's classes, [N, C].
        scores: positions over the subclass temperature, [N, C, S].
        temperature: T > 0 of the classes alone.

    Source: Loo et al. 2024 (arXiv 2409.20449), section 3.3.
    """
    classes = F.log_softmax(full_precision(logits) / temperature, dim=-1)
    return classes.unsqueeze(-1) + F.log_softmax(full_precision(scores), dim=-1)


def fold(logits: Tensor, classes: int) -> Tensor:
    """Class logits [N, C] of subclass logits [N, C * S]: their softmax sums each class's subclasses."""
    return torch.unflatten(full_precision(logits), 1, (classes, -1)).logsumexp(-1)


def subclass_kl(
    student: Tensor,
    teacher: Tensor,
    classes: int,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² · KL(q ‖ softmax(student / T)) over all subclasses, in nats.

    With one subclass to a class it is ``kl_divergence``.

    Args:
        student: logits [N, C * S], the subclasses of a class side by side.
        teacher: log q [N, C * S] at temperature 1, up to a constant for each sample; detached here. At other
            temperatures its classes are softened and what it says within a class stays.
        classes: C.
        temperature: T > 0.
        mask: True = counts, [N].
        weights: >= 0, [N].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [N] with ``reduction="none"``.

    Raises:
        ShapeError: the two differ in shape.

    Source: Loo et al. 2024 (arXiv 2409.20449), section 3.3.
    """
    parts = full_precision(teacher.detach()).reshape(len(teacher), classes, -1)
    target = subclass_log_probs(parts.logsumexp(-1), parts, temperature).flatten(1)
    scaled = full_precision(student) / temperature
    return temperature**2 * kl_divergence(scaled, target, mask=mask, weights=weights, reduction=reduction)
