"""Cross entropy against the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.losses.chunked import chunked
from limbeck.objectives._shared import at_least
from limbeck.objectives._tokens import hidden_of


@dataclass(frozen=True, kw_only=True)
class Labels(Objective):
    """Cross entropy of the class head against the labels, with or without label smoothing.

    ``terms`` reads ``student.logits`` [B, C] and ``batch.labels`` [B] in 0 .. C - 1; of a language model its
    hidden states and the next tokens. No teacher.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        smoothing: share of the target spread evenly over all classes, in [0, 1).

    Raises:
        ConfigError: a field out of its range.

    Source: label smoothing: Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 7.
    """

    zero_at_teacher: ClassVar[bool] = False
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        if self.path:
            raise ConfigError(f"path is {self.path!r} but labels listen to no teacher: leave path out")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(
                f"smoothing is {self.smoothing} but must lie in [0, 1): 0 is plain cross entropy"
            )

    def needs(self) -> Needs:
        """Neither taps nor teacher; of a language model no logits but with smoothing."""
        return Needs(teacher_logits=False, logits=self.smoothing > 0)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"labels": weight * cross entropy}``, the mean over the samples whose label may be read."""
        if student.hidden is not None and not self.smoothing:
            found = chunked(hidden_of(student), labels=batch.labels, weights=batch.weight)
            return {"labels": self.weight * found.loss}
        counted = student.mask if batch.labelled is None else batch.labelled
        loss = losses.cross_entropy(
            student.logits, batch.labels, smoothing=self.smoothing, mask=counted, weights=batch.weight
        )
        return {"labels": self.weight * loss}
