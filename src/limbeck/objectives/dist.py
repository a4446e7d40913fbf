"""DIST: the student keeps the teacher's relations between classes and between samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.objectives._shared import above, at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class DIST(Objective):
    """DIST: correlation instead of equality of the class distributions (Huang et al., NeurIPS 2022).

    ``terms`` reads ``student.soft`` [B, C] and ``teacher.logits`` [B, C]. Beside it stand the ``labels`` with
    weight 1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        beta: factor of the inter-class part: each sample's classes, >= 0.
        gamma: factor of the intra-class part: each class over the samples of the batch, >= 0.
        temperature: tau > 0, 1 on ImageNet and 4 on CIFAR-100; both terms carry tau².

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Huang et al., NeurIPS 2022 (arXiv 2205.10536); tau and weights as in the official classification
    code, whose trainer multiplies beta = gamma = 1 by 2.
    """

    zero_at_teacher: ClassVar[bool] = True

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            at_least(name, getattr(self, name), 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"inter": ..., "intra": ...}``: both parts with their weights."""
        inter, intra = losses.dist(
            student.soft, teacher.logits, self.temperature, mask=student.mask, weights=batch.weight
        )
        return {"inter": self.beta * inter, "intra": self.gamma * intra}
