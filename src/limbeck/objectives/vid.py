"""Variational information distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.objectives._shared import above, as_many, at_least, map_pairs

LEAST_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class VID(Objective):
    """Variational information: the teacher's maps must be likely given the student's (Ahn et al. 2019).

    A learned map of each student stage predicts the teacher's stage as the mean of a normal distribution,
    whose variance per channel is learned too. Maps [B, C, H, W] of any channels and sizes; tokens [B, T, D]
    become a square map, a vector [B, D] one of one pixel. In the reference codes all stages but the stem are
    tapped, beside ``labels`` at weight 1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        variance: what every channel's variance starts at, above 1e-5.
        student_taps: module paths, one or more, shallow to deep.
        teacher_taps: as many, for the teacher.

    Raises:
        ConfigError: a field out of its range, or different numbers of taps.
        ShapeError: ``build`` finds no such feature, or none that is a map.

    Source: Ahn et al., CVPR 2019 (arXiv 1904.05835), eq. 6; network and constants of the RepDistiller
    reference code.
    Differs: the mean over elements of that code, not the sum; mdistiller leaves the variance as it starts.
    """

    zero_at_teacher: ClassVar[bool] = False
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    variance: float = 5.0
    student_taps: tuple[str, ...] = ("blocks.-1",)
    teacher_taps: tuple[str, ...] = ("blocks.-1",)

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        above("variance", self.variance, LEAST_VARIANCE)
        as_many(self.student_taps, self.teacher_taps)

    def needs(self) -> Needs:
        """The taps of both networks; no teacher logits."""
        return Needs(student=self.student_taps, teacher=self.teacher_taps, teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The networks that predict the teacher's maps, drawn from torch's global generator."""
        pairs = map_pairs(student, teacher, self.student_taps, self.teacher_taps)
        stages = [Guess(own.shape[1], other.shape[1], self.variance) for own, other in pairs]
        return Information(self, stages).to(pairs[0][0].device)


class Information(nn.Module):
    """``VID`` with its learned distributions, one for each stage."""

    def __init__(self, objective: VID, stages: list[Guess]) -> None:
        super().__init__()
        self.objective = objective
        self.stages = nn.ModuleList(stages)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        choice, dtype, found = self.objective, next(self.parameters()).dtype, []
        pairs = map_pairs(student, teacher, choice.student_taps, choice.teacher_taps)
        for guess, (own, other) in zip(self.stages, pairs, strict=True):
            own, other = losses.at_one_size(own.to(dtype), other)
            mean, variance = guess(own)
            found.append(losses.variational_information(mean, other, variance, weights=batch.weight))
        return {"vid": choice.weight * torch.stack(found).sum()}


class Guess(nn.Module):
    """A normal distribution over the teacher's map [B, C_t, H, W], given the student's [B, C_s, H, W]."""

    def __init__(self, channels: int, wide: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 1, bias=False),
        )
        extra = variance - LEAST_VARIANCE
        start = extra + math.log(-math.expm1(-extra))  # the inverse of softplus, without an overflow
        self.spread = nn.Parameter(torch.full((wide,), start))

    def forward(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Means [B, C_t, H, W] and variances [C_t]."""
        return self.mean(own), F.softplus(self.spread) + LEAST_VARIANCE
