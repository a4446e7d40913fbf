"""Similarity-preserving distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.objectives._shared import at_least, feature


@dataclass(frozen=True, kw_only=True)
class SP(Objective):
    """Similarity preserving: samples alike for the teacher are alike for the student (Tung and Mori 2019).

    ``terms`` reads one feature [B, ...] of each network, of any shape: all of it is one vector. In the
    reference codes it is the last map, beside ``labels`` at weight 1. The loss changes with the batch size.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        student_tap: module path of the student's feature.
        teacher_tap: module path of the teacher's feature.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds no such feature.

    Source: Tung and Mori, ICCV 2019 (arXiv 1907.09682), eq. 4; constants of the mdistiller and RepDistiller
    reference codes.
    """

    zero_at_teacher: ClassVar[bool] = True

    weight: float = 3000.0
    student_tap: str = "blocks.-1"
    teacher_tap: str = "blocks.-1"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)

    def needs(self) -> Needs:
        """One tap in each network; no teacher logits."""
        return Needs(student=(self.student_tap,), teacher=(self.teacher_tap,), teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the taps are looked at."""
        self._features(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"sp": ...}``: the mean squared difference of the similarities."""
        own, other = self._features(student, teacher)
        return {"sp": self.weight * losses.similarity_relations(own, other, weights=batch.weight)}

    def _features(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        return feature("student", student, self.student_tap), feature("teacher", teacher, self.teacher_tap)
