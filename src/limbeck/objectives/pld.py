"""PLD: the student learns the ranking "true class first, then as the teacher has them"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.losses.plackett_luce import Weighting
from limbeck.objectives._shared import above, at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class PLD(Objective):
    """Plackett-Luce distillation: one ranking loss in the place of labels and KD (Bassam et al. 2025).

    ``terms`` reads ``student.soft`` [B, C], ``teacher.logits`` [B, C] and ``batch.labels`` [B] in 0 .. C - 1.
    The cross entropy is in it, as its first place: nothing stands beside it, unless the student has a second
    head, whose class head needs the ``labels``.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        temperature: of the teacher's probabilities that weigh the places, > 0; 1 on ImageNet, 4 on CIFAR-100
            and for any teacher that is all but certain, whose weights are else (1, 0, ...), cross entropy. It
            divides no logits, and nothing carries its square.
        weighting: what each place of the ranking counts: ``teacher``, its probability of the class there;
            ``first``, cross entropy; ``uniform``, ListMLE; ``position``, position-aware ListMLE.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542), appendix C; other weightings: section 4.2.
    Differs: the weights of ``position`` are divided by their sum, so that all weightings have one scale.
    """

    zero_at_teacher: ClassVar[bool] = False
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 1.0
    weighting: Weighting = "teacher"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"pld": weight * the mean loss of the rankings}``."""
        loss = losses.pld(
            student.soft,
            teacher.logits,
            batch.labels,
            self.temperature,
            weighting=self.weighting,
            mask=student.mask,
            weights=batch.weight,
        )
        return {"pld": self.weight * loss}
