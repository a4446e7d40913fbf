"""Logit distillation: the softened class distributions are matched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.objectives._shared import above, at_least, matched, same_classes


@dataclass(frozen=True, kw_only=True)
class KD(Objective):
    """Knowledge distillation: KL of the softened class distributions (Hinton et al. 2015).

    ``terms`` reads ``student.soft`` [B, C] (the second head, where there is one) and ``teacher.logits``
    [B, C]. The cross entropy beside it is the objective ``labels``: 0.1 of it with the defaults here; in
    continual distillation (arXiv 2407.13911) both weigh 0.5 and the temperature is 2.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        temperature: T > 0; the term carries T².
        standardise: match logits of mean 0 and deviation 1 in each row, so that the scale of neither network
            counts; then the temperature is 2 and the weight 9 (Sun et al., CVPR 2024, arXiv 2403.01427).

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), section 2; constants of the mdistiller
    reference code (CIFAR-100).
    """

    zero_at_teacher: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 0.9
    temperature: float = 4.0
    standardise: bool = False

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"kd": weight * T² * KL(teacher ‖ student)}``."""
        own, other = matched(student, teacher, self.standardise)
        loss = losses.kl_divergence(own, other, self.temperature, mask=student.mask, weights=batch.weight)
        return {"kd": self.weight * loss}
