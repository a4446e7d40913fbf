"""Relational knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.objectives._shared import as_vector, at_least, feature


@dataclass(frozen=True, kw_only=True)
class RKD(Objective):
    """Relational KD: distances between samples, and angles of their triples, are matched (Park et al. 2019).

    ``terms`` reads one feature of each network: vectors [B, D]; the mean of a map [B, C, H, W]; of tokens
    [B, T, D] the class token, or without one their mean. In the reference codes it is the pooled feature
    before the classifier, beside ``labels`` at weight 1. The time of the angles grows with the cube of the
    batch size.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of both terms, >= 0.
        distance: factor of the distances, >= 0.
        angle: factor of the angles, >= 0.
        student_tap: module path of the student's feature.
        teacher_tap: module path of the teacher's feature.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds no such feature, or tokens that cannot be pooled.

    Source: Park et al., CVPR 2019 (arXiv 1904.05068), eq. 6 to 10; constants of the official code for metric
    learning (25 and 50), as the mdistiller and RepDistiller reference codes take them.
    """

    zero_at_teacher: ClassVar[bool] = True

    weight: float = 1.0
    distance: float = 25.0
    angle: float = 50.0
    student_tap: str = "blocks.-1"
    teacher_tap: str = "blocks.-1"

    def __post_init__(self) -> None:
        for name in ("weight", "distance", "angle"):
            at_least(name, getattr(self, name), 0)

    def needs(self) -> Needs:
        """One tap in each network; no teacher logits."""
        return Needs(student=(self.student_tap,), teacher=(self.teacher_tap,), teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the taps are looked at."""
        self._features(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"distance": ..., "angle": ...}``, each with its weights; one of weight 0 is left out."""
        own, other = self._features(student, teacher)
        relations = {
            "distance": (self.distance, losses.distance_relations),
            "angle": (self.angle, losses.angle_relations),
        }
        return {
            name: self.weight * factor * relate(own, other, weights=batch.weight)
            for name, (factor, relate) in relations.items()
            if factor
        }

    def _features(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        own = feature("student", student, self.student_tap)
        return as_vector(own), as_vector(feature("teacher", teacher, self.teacher_tap))
