"""Attention transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.objectives._shared import as_many, at_least, map_pairs


@dataclass(frozen=True, kw_only=True)
class AT(Objective):
    """Attention transfer: the student is active where the teacher is (Zagoruyko and Komodakis 2017).

    ``terms`` reads maps [B, C, H, W] of any channels and sizes; tokens [B, T, D] become a square map. In the
    reference codes all stages but the stem are tapped, beside ``labels`` at weight 1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        power: p >= 1: how much large activations count.
        student_taps: module paths, one or more, shallow to deep.
        teacher_taps: as many, for the teacher.

    Raises:
        ConfigError: a field out of its range, or different numbers of taps.
        ShapeError: ``build`` finds no such feature, or none that is a map.

    Source: Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928), eq. 2; constants of the mdistiller and
    RepDistiller reference codes.
    Differs: the mean of squared differences of both codes, hence the weight 1000.
    """

    zero_at_teacher: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1000.0
    power: float = 2.0
    student_taps: tuple[str, ...] = ("blocks.-1",)
    teacher_taps: tuple[str, ...] = ("blocks.-1",)

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("power", self.power, 1)
        as_many(self.student_taps, self.teacher_taps)

    def needs(self) -> Needs:
        """The taps of both networks; no teacher logits."""
        return Needs(student=self.student_taps, teacher=self.teacher_taps, teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the taps are looked at."""
        map_pairs(student, teacher, self.student_taps, self.teacher_taps)
        return super().build(student, teacher, facts)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"at": ...}``: the distances of the attention maps, summed over the stages."""
        stages = [
            losses.attention_transfer(own, other, self.power, weights=batch.weight)
            for own, other in map_pairs(student, teacher, self.student_taps, self.teacher_taps)
        ]
        return {"at": self.weight * torch.stack(stages).sum()}
