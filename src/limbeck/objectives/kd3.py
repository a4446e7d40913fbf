"""KD3: weighted feature regression, and features that do not depend on an image's style."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Net, Objective, Outputs, Progress
from limbeck.engine.seeds import derive
from limbeck.errors import ConfigError
from limbeck.losses.contrastive import nt_xent
from limbeck.losses.kd3 import mix_distribution, weighted_feature_loss
from limbeck.objectives._shared import above, at_least, feature

NAME = "kd3"  # what the student says to the mixed images stands in its paths under this name
PROJECTED, POOLED = "projected", "pooled"  # what the student ``kd3`` gives


@dataclass(frozen=True, kw_only=True)
class KD3(Objective):
    """The projected map is regressed onto the teacher's; an image is to look like itself in another style.

    For the student ``kd3``. The regression counts more where the two networks' logits differ. The second
    view is the same images with mixed channel statistics (MixDistribution); the contrast pulls the pooled
    features of both views together. Neither labels nor a divergence of logits have a part.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the regression, >= 0.
        contrast: factor of the contrast, >= 0; 0 = no second view.
        temperature: of the contrast, > 0.
        mix: both parameters of the Beta distribution that statistics are mixed by, > 0.
        width: of the embedding that is contrasted.
        embed_teacher: also contrast the teacher's features, through an embedding of their own, as the
            official code does; that costs a second pass of the teacher and cannot change the student.
        teacher_tap: module path of the teacher's last feature map.

    Raises:
        ConfigError: a field out of its range; ``build`` without the teacher that ``embed_teacher`` asks for.
        ShapeError: features that cannot be matched.

    Source: Tang et al., ICCV 2023 (arXiv 2307.11469), official code.
    Differs: the teacher's embedding is off by default.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 1.0
    contrast: float = 0.001
    temperature: float = 0.3
    mix: float = 0.1
    width: int = 128
    embed_teacher: bool = False
    teacher_tap: str = "stages.-1"

    def __post_init__(self) -> None:
        for name, low in (("weight", 0), ("contrast", 0), ("width", 1)):
            at_least(name, getattr(self, name), low)
        for name in ("temperature", "mix"):
            above(name, getattr(self, name), 0)

    def needs(self) -> Needs:
        """The student's projected map and pooled feature, the teacher's map and logits."""
        pooled = (POOLED,) if self.contrast > 0 else ()
        return Needs(student=(PROJECTED, *pooled), teacher=(self.teacher_tap,))

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The embeddings, drawn from torch's global generator; nothing to learn without contrast."""
        self.terms(student, teacher, _BLANK, Progress())  # what does not fit is found here
        if self.contrast == 0:
            return super().build(student, teacher, facts)
        if self.embed_teacher and facts.teacher is None:
            raise ConfigError("embed_teacher is on but there is no teacher to ask: name one, or leave it off")
        own = pooled(feature("student", student, POOLED)).shape[1]
        other = pooled(feature("teacher", teacher, self.teacher_tap)).shape[1]
        return Contrasted(self, own, other, facts).to(student.logits.device)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"features": weight * mean of w (g - f_t)²}``."""
        own = feature("student", student, PROJECTED)
        other = feature("teacher", teacher, self.teacher_tap)
        if other.ndim == 4 and other.shape[2:] != own.shape[2:]:
            other = F.adaptive_avg_pool2d(other, (own.shape[2], own.shape[3]))
        loss = weighted_feature_loss(own, other, student.logits, teacher.logits, weights=batch.weight)
        return {"features": self.weight * loss}


class Contrasted(nn.Module):
    """``KD3`` with its embeddings and its second view."""

    def __init__(self, objective: KD3, own: int, other: int, facts: Facts) -> None:
        super().__init__()
        self.objective, self.seed = objective, facts.seed
        self.embed = nn.Linear(own, objective.width)
        self.embed_teacher = nn.Linear(other, objective.width) if objective.embed_teacher else None
        self._teacher: tuple[Net, ...] = () if facts.teacher is None else (facts.teacher,)

    def view(self, batch: Batch, at: Progress) -> Batch:
        """The images with mixed channel statistics; the draws depend on the step alone."""
        draws = np.random.default_rng(derive(self.seed, at.task, at.step))
        count, mix, place = len(batch.inputs), self.objective.mix, batch.inputs.device
        share = torch.from_numpy(draws.beta(mix, mix, (count, 1, 1, 1))).to(batch.inputs)
        order = torch.from_numpy(draws.permutation(count)).to(place)
        return replace(batch, inputs=mix_distribution(batch.inputs, share, order))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        objective = self.objective
        one, other = (feature("student", said, POOLED) for said in (student, student.along(NAME)))
        contrast = self._contrast(self.embed, one, other, batch.weight)
        if self.embed_teacher is not None:
            (net,) = self._teacher
            with torch.no_grad():
                again = net(self.view(batch, at), taps=(objective.teacher_tap,))
            one, other = (feature("teacher", said, objective.teacher_tap) for said in (teacher, again))
            contrast = contrast + self._contrast(self.embed_teacher, one, other, batch.weight)
        return objective.terms(student, teacher, batch, at) | {"contrast": objective.contrast * contrast}

    def _contrast(self, embed: nn.Linear, one: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
        u, v = (embed(pooled(x).to(embed.weight.dtype)) for x in (one, other))
        return nt_xent(u, v, self.objective.temperature, weights=weights)


def pooled(feature: Tensor) -> Tensor:
    """The mean over pixels or tokens: [B, D] from [B, D, h, w] or [B, T, D]."""
    return feature.mean((2, 3)) if feature.ndim == 4 else feature.mean(1)


_NONE = torch.zeros(0, dtype=torch.int64)
_BLANK = Batch(inputs=_NONE, labels=_NONE, index=_NONE, view=_NONE)
