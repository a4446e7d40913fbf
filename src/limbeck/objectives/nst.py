"""Neuron selectivity transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.objectives._shared import as_many, at_least, map_pairs


@dataclass(frozen=True, kw_only=True)
class NST(Objective):
    """Neuron selectivity: the channels of both maps are matched as distributions (Huang and Wang 2017).

    ``terms`` reads maps [B, C, H, W] of any channels and sizes; tokens [B, T, D] become a square map. A map
    of one pixel says nothing, since each channel has length 1. In the reference codes all stages but the stem
    are tapped, beside ``labels`` at weight 1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        student_taps: module paths, one or more, shallow to deep.
        teacher_taps: as many, for the teacher.

    Raises:
        ConfigError: a field out of its range, or different numbers of taps.
        ShapeError: ``build`` finds no such feature, or none that is a map.

    Source: Huang and Wang 2017 (arXiv 1707.01219), eq. 5, polynomial kernel; constants of the mdistiller and
    RepDistiller reference codes.
    """

    zero_at_teacher: ClassVar[bool] = True

    weight: float = 50.0
    student_taps: tuple[str, ...] = ("blocks.-1",)
    teacher_taps: tuple[str, ...] = ("blocks.-1",)

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        as_many(self.student_taps, self.teacher_taps)

    def needs(self) -> Needs:
        """The taps of both networks; no teacher logits."""
        return Needs(student=self.student_taps, teacher=self.teacher_taps, teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the taps are looked at."""
        map_pairs(student, teacher, self.student_taps, self.teacher_taps)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"nst": ...}``: the discrepancies, summed over the stages."""
        stages = [
            losses.neuron_selectivity(own, other, weights=batch.weight)
            for own, other in map_pairs(student, teacher, self.student_taps, self.teacher_taps)
        ]
        return {"nst": self.weight * torch.stack(stages).sum()}
