"""Pseudo-subclasses: the student matches where the teacher's embedding lies within each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.errors import ShapeError
from limbeck.objectives._shared import above, at_least


@dataclass(frozen=True, kw_only=True)
class LELP(Objective):
    """The student's subclass probabilities against those of the teacher ``lelp`` (Loo et al. 2024).

    ``terms`` reads ``student.soft`` [B, C * S] of the student ``lelp`` and the teacher's ``soft`` [B, C * S]:
    log-probabilities. No labels are read; the objective ``labels`` beside it is the paper's alpha, which it
    sets to 0. With one subclass it is ``kd``.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        temperature: T > 0 of the classes and of the student's outputs; the term carries T².

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of subclasses.

    Source: Loo et al. 2024 (arXiv 2409.20449), section 3.3.
    """

    zero_at_teacher: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the numbers of subclasses are compared."""
        own, other = student.soft.shape[1], teacher.soft.shape[1]
        if own != other:
            raise ShapeError(
                f"the student tells {own} subclasses apart and the teacher {other}: take student lelp and "
                "teacher lelp with as many subclasses of the same classes"
            )
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"lelp": weight * T² * KL(teacher ‖ student)}`` over the subclasses."""
        loss = losses.subclass_kl(
            student.soft,
            teacher.soft,
            teacher.logits.shape[1],
            self.temperature,
            mask=student.mask,
            weights=batch.weight,
        )
        return {"lelp": self.weight * loss}
