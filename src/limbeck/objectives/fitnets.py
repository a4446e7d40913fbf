"""FitNets: the student's features are regressed onto the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives._shared import at_least, feature


@dataclass(frozen=True, kw_only=True)
class FitNets(Objective):
    """Hints: the student's feature is regressed onto the teacher's by a learned map (Romero et al. 2015).

    Tokens [B, T, D] go through one linear map to the teacher's width; maps [B, C, H, W] through a convolution
    that brings width and size to the teacher's, batch norm and ReLU. The feature term alone: logit
    distillation beside it is the objective ``kd``. The weight is the reference code's for maps; for tokens in
    continual distillation (arXiv 2407.13911) it is 0.1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        until: share of the epochs, from the first on, that give hints, in (0, 1]; 1 = all of them.
        student_tap: module path of the student's feature.
        teacher_tap: module path of the teacher's feature.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds no such feature, or two that cannot be matched.

    Source: Romero et al., ICLR 2015 (arXiv 1412.6550), eq. 3; regressor of the mdistiller and RepDistiller
    reference codes.
    Differs: the hint stands beside the other terms, as in both codes; the paper gives hints alone first, and
    none afterwards. ``until`` below 1 ends the hints, while the other terms count from the start.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 100.0
    until: float = 1.0
    student_tap: str = "blocks.-1"
    teacher_tap: str = "blocks.-1"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        if not 0 < self.until <= 1:
            raise ConfigError(f"until is {self.until} but must lie in (0, 1]: 1 gives hints in all epochs")

    def needs(self) -> Needs:
        """One tap in each network; no teacher logits."""
        return Needs(student=(self.student_tap,), teacher=(self.teacher_tap,), teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The regressor from the student's feature to the teacher's, drawn from torch's global generator."""
        own = feature("student", student, self.student_tap)
        other = feature("teacher", teacher, self.teacher_tap)
        return Hint(self, regressor(own, other)).to(own.device)


class Hint(nn.Module):
    """``FitNets`` with its learned regressor."""

    def __init__(self, objective: FitNets, regress: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.regress = regress

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        own = feature("student", student, self.objective.student_tap)
        other = feature("teacher", teacher, self.objective.teacher_tap)
        guess = self.regress(own.to(next(self.regress.parameters()).dtype))
        weight = self.objective.weight if at.epoch < self.objective.until * at.epochs else 0.0
        return {"fitnets": weight * losses.hint_mse(guess, other, weights=batch.weight)}


class ConvRegressor(nn.Sequential):
    """Convolution, batch norm, ReLU: from a map [B, C, H, W] to the teacher's width and size.

    Source: ConvReg of the mdistiller and RepDistiller codes: half the height by stride 2, twice by a
    transposed convolution, otherwise by a kernel that is as much larger as the map must shrink.
    """

    def __init__(self, own: Tensor, other: Tensor) -> None:
        convolution = _convolution(own.shape[1], own.shape[2], other.shape[1], other.shape[2])
        meta = {name: p.to("meta") for name, p in convolution.named_parameters()}
        made = torch.func.functional_call(convolution, meta, torch.empty(own.shape, device="meta"))
        _same_size(made, other)
        super().__init__(convolution, nn.BatchNorm2d(other.shape[1]), nn.ReLU())


def _convolution(channels: int, size: int, wide: int, height: int) -> nn.Module:
    if size == 2 * height:
        return nn.Conv2d(channels, wide, kernel_size=3, stride=2, padding=1)
    if 2 * size == height:
        return nn.ConvTranspose2d(channels, wide, kernel_size=4, stride=2, padding=1)
    if size >= height:
        return nn.Conv2d(channels, wide, kernel_size=1 + size - height)
    raise ShapeError(
        f"the student's map is {size} high but the teacher's is {height}: only equal, larger or half as high "
        "can be regressed; tap other layers"
    )


def _same_size(made: Tensor, other: Tensor) -> None:
    if made.shape[2:] != other.shape[2:]:
        raise ShapeError(
            f"the student's map is regressed to {list(made.shape[2:])} but the teacher's is "
            f"{list(other.shape[2:])}: tap maps of one aspect ratio"
        )


def regressor(own: Tensor, other: Tensor) -> nn.Module:
    """The map from ``own`` to the shape of ``other``: linear for tokens, convolutional for maps.

    Raises:
        ShapeError: tokens against maps, different numbers of tokens, or a size that cannot be reached.
    """
    if own.ndim == other.ndim == 3:
        if own.shape[1] != other.shape[1]:
            raise ShapeError(
                f"the student has {own.shape[1]} tokens but the teacher has {other.shape[1]}: "
                "use equal patch grids, and no extra token (KD token, prepended prompts) in one of them alone"
            )
        return nn.Linear(own.shape[2], other.shape[2])
    if own.ndim == other.ndim == 4:
        return ConvRegressor(own, other)
    raise ShapeError(
        f"the student's feature is {list(own.shape)} but the teacher's is {list(other.shape)}: "
        "tap tokens [B, T, D] in both or maps [B, C, H, W] in both"
    )
