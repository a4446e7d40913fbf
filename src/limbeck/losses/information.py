"""Variational information distillation: how likely the teacher's features are, given the student's."""

from __future__ import annotations

from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, reduce, same_shape


def variational_information(
    guess: Tensor,
    teacher: Tensor,
    variance: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log likelihood of the teacher's features under normal distributions, without its constant.

    The mean over elements of ((guess - teacher)² / variance + log variance) / 2, which is smallest where the
    variance is the mean squared error.

    Args:
        guess: means [B, C, ...] that the student gives.
        teacher: features of the same shape; detached here.
        variance: > 0, [C].
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Returns:
        A scalar, or [B] with ``reduction="none"``.

    Raises:
        ShapeError: guess and teacher differ in shape.

    Source: Ahn et al., CVPR 2019 (arXiv 1904.05835), eq. 6.
    """
    same_shape("features", guess, teacher)
    error = (full_precision(guess) - full_precision(teacher.detach())).square()
    spread = full_precision(variance).reshape(-1, *(1,) * (guess.ndim - 2))
    items = 0.5 * (error / spread + spread.log()).flatten(1).mean(1)
    return reduce(items, weights=weights, reduction=reduction)
