"""Squared error of the class probabilities, against the labels or the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.losses.probability import probability_mse
from limbeck.objectives._shared import at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class ProbabilityMSE(Objective):
    """Squared error between softmax probabilities and the one-hot labels, or the teacher's probabilities.

    Self-distillation has one of each; scenario ``self_distillation`` weighs them by alpha and 1 - alpha.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        target: ``teacher``, or ``labels``, which asks no teacher.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), official code: the mean over samples
    and classes.
    """

    zero_at_teacher: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    target: Literal["teacher", "labels"] = "teacher"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)

    def needs(self) -> Needs:
        """The teacher's logits, where it is the target."""
        return Needs(teacher_logits=self.target == "teacher")

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        if self.target == "teacher":
            same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"labels": ...}`` over the samples whose label may be read, or ``{"teacher": ...}``."""
        if self.target == "teacher":
            own, target, counted = student.soft, teacher.logits.detach().float().softmax(-1), student.mask
        else:
            own = student.logits
            target = F.one_hot(batch.labels, own.shape[-1]).float()
            counted = student.mask if batch.labelled is None else batch.labelled
        loss = probability_mse(own, target, mask=counted, weights=batch.weight)
        return {self.target: self.weight * loss}
