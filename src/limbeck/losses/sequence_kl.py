"""KL with a mean over texts instead of one over tokens, as the study of fidelity computes it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import ShapeError, unknown
from limbeck.losses.divergences import Pair, counted_rows, pair_of
from limbeck.losses.reduction import same_shape

Direction = Literal["forward", "reverse"]

# Added to the probabilities that weight the sum, which are not normalised again, as the official code does.
EPS = 1e-9


def sequence_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """T² times the mean over texts of the mean over their counted tokens of KL, in nats.

    Args:
        student: logits [B, T, V].
        teacher: logits [B, T, V]; detached here.
        mask: True = counts, [B, T]. Texts of which nothing counts are left out.
        temperature: T > 0.
        direction: ``"forward"`` is KL(teacher ‖ student), ``"reverse"`` the other way round.

    Returns:
        A scalar; 0 where nothing counts.

    Raises:
        ShapeError: the shapes do not fit one another.
        ConfigError: an unknown ``direction``.

    Source: Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442), official code, kd_trainer.py.
    Differs: a text of which nothing counts is skipped (the official code gives 0 / 0).
    """
    if direction not in get_args(Direction):
        raise unknown("direction", direction, get_args(Direction))
    same_shape("logits", student, teacher)
    if mask.shape != student.shape[:-1]:
        raise ShapeError(
            f"mask is {list(mask.shape)} for logits {list(student.shape)}: give one value per token"
        )
    pair = pair_of(counted_rows(student, mask), counted_rows(teacher, mask), temperature)
    counts = mask.bool()
    tokens = torch.where(counts, _items(pair, direction), 0).sum(-1) / counts.sum(-1).clamp(min=1)
    return temperature**2 * tokens.sum() / counts.any(-1).sum().clamp(min=1)


def _items(pair: Pair, direction: Direction) -> Tensor:
    if direction == "forward":
        return ((pair.p + EPS) * (pair.log_p - pair.log_q)).sum(-1)
    return ((pair.q + EPS) * (pair.log_q - pair.log_p)).sum(-1)
