"""Decoupled KD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.objectives._shared import above, at_least, matched, same_classes, warm_up


@dataclass(frozen=True, kw_only=True)
class DKD(Objective):
    """Decoupled KD: the target class and the rest are matched apart (Zhao et al., CVPR 2022).

    ``terms`` reads ``student.soft`` [B, C], ``teacher.logits`` [B, C] and ``batch.labels`` [B] in 0 .. C - 1.
    With one class both terms are 0. In continual distillation (arXiv 2407.13911): weight 0.5, beta 4, no
    warm-up.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of both terms, >= 0.
        alpha: factor of the target part (TCKD), >= 0.
        beta: factor of the non-target part (NCKD), >= 0; 2 or 6 for some pairs of the paper.
        temperature: T > 0; both terms carry T².
        standardise: match logits of mean 0 and deviation 1 in each row; then the temperature is 2 and the
            weight 9 (Sun et al., CVPR 2024, arXiv 2403.01427).
        warmup_epochs: epochs over which both grow linearly from 1/warmup_epochs to their full size; 0 = none.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Zhao et al., CVPR 2022 (arXiv 2203.08679), eq. 7; warm-up of the official code (mdistiller).
    """

    zero_at_teacher: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    standardise: bool = False
    warmup_epochs: int = 20

    def __post_init__(self) -> None:
        for name in ("weight", "alpha", "beta", "warmup_epochs"):
            at_least(name, getattr(self, name), 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"target": ..., "rest": ...}``: TCKD and NCKD with their weights."""
        own, other = matched(student, teacher, self.standardise)
        target, rest = losses.decoupled_kl(
            own, other, batch.labels, self.temperature, mask=student.mask, weights=batch.weight
        )
        scale = self.weight * warm_up(at, self.warmup_epochs)
        return {"target": scale * self.alpha * target, "rest": scale * self.beta * rest}
