"""Dual-head optimisation: labels for one head, the teacher for the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.objectives._shared import above, at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class DHO(Objective):
    """Labels and teacher apart: each with a head of its own (DHO, arXiv 2505.07675).

    ``terms`` reads ``student.logits`` and ``batch.labels`` of the labelled samples, and ``student.soft`` and
    ``teacher.logits`` [B, C] of all: the student ``dual_head`` has both heads. With one head it is what the
    paper sets itself against, cross entropy and KD on the same logits. The teacher's term of labelled and
    that of unlabelled samples are means of their own, so the few labelled ones count as much as the many
    others.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of all terms, >= 0; 2 in the code for 1 % and 10 % of ImageNet.
        balance: share lambda of the labels, in [0, 1]; the teacher's two terms have the rest each.
        temperature: T > 0; the teacher's terms carry T².

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: DHO (arXiv 2505.07675), official code, train_others.py.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 1.0
    balance: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("temperature", self.temperature, 0)
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance is {self.balance} but must lie in [0, 1]: 1 is labels alone")

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"labels": ..., "labelled": ..., "unlabelled": ...}``: the labels, and the teacher on either."""
        known = torch.ones_like(batch.labels).bool() if batch.labelled is None else batch.labelled
        labels, labelled, unlabelled = losses.dual_head(
            student.logits,
            student.soft,
            teacher.logits,
            batch.labels,
            known,
            self.temperature,
            weights=batch.weight,
        )
        own, taught = self.weight * self.balance, self.weight * (1 - self.balance)
        return {"labels": own * labels, "labelled": taught * labelled, "unlabelled": taught * unlabelled}
