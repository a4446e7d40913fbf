"""Knowledge review: the student's layers, fused from the deepest up, are matched with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.errors import ShapeError
from limbeck.objectives._shared import as_many, at_least, feature, warm_up


@dataclass(frozen=True, kw_only=True)
class ReviewKD(Objective):
    """Knowledge review: fused student features against teacher features, layer by layer (Chen et al. 2021).

    The student's features are fused from the deepest to the shallowest; each fused feature is matched with
    the teacher's of its place. Tokens [B, T, D] are fused with learned elementwise gates and matched by MSE
    averaged over blocks; maps [B, C, H, W] (a pooled vector [B, C] counts as 1 × 1) are fused with spatial
    attention and matched by the hierarchical context loss, summed over stages. The feature term alone: logit
    distillation beside it is the objective ``kd``. In continual distillation (arXiv 2407.13911): weight 0.2,
    12 blocks, no warm-up.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0; 1 to 10 by pair in the paper.
        blocks: how many last blocks (``blocks.-1`` ..) are tapped where the taps are not given; a network
            with fewer says so.
        student_taps: module paths from shallow to deep; empty = the last ``blocks`` blocks.
        teacher_taps: as many, for the teacher; pre-activation maps in the paper.
        warmup_epochs: epochs over which the term grows linearly from 1/warmup_epochs to full size; 0 = none.

    Raises:
        ConfigError: a field out of its range, or different numbers of taps.
        ShapeError: ``build`` finds no such feature, or two that cannot be matched.

    Source: maps: Chen et al., CVPR 2021 (arXiv 2104.09044), sections 3.2 and 3.3, with the constants of the
    official code; tokens: Zhang, Guo, Xiang 2024 (arXiv 2407.13911), official code, models/zoo.py.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 1.0
    blocks: int = 12
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    warmup_epochs: int = 20

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("blocks", self.blocks, 1)
        at_least("warmup_epochs", self.warmup_epochs, 0)
        as_many(*self.taps)

    @property
    def taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(student's, teacher's) taps, shallow to deep."""
        last = tuple(f"blocks.-{i}" for i in range(self.blocks, 0, -1))
        return self.student_taps or last, self.teacher_taps or last

    def needs(self) -> Needs:
        """The taps of both networks; no teacher logits."""
        own, other = self.taps
        return Needs(student=own, teacher=other, teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The fusion from the student's features to the teacher's, drawn from torch's global generator."""
        own = [feature("student", student, tap) for tap in self.taps[0]]
        other = [feature("teacher", teacher, tap) for tap in self.taps[1]]
        return Review(self, fusion(own, other)).to(own[0].device)


class Review(nn.Module):
    """``ReviewKD`` with its learned fusion."""

    def __init__(self, objective: ReviewKD, fuse: TokenFusion | MapFusion) -> None:
        super().__init__()
        self.objective = objective
        self.fuse = fuse

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        own_taps, other_taps = self.objective.taps
        dtype = next(self.fuse.parameters()).dtype
        fused = self.fuse([feature("student", student, tap).to(dtype) for tap in own_taps])
        targets = [feature("teacher", teacher, tap) for tap in other_taps]
        loss = self.fuse.distance(fused, targets, weights=batch.weight)
        return {"reviewkd": self.objective.weight * warm_up(at, self.objective.warmup_epochs) * loss}


class TokenFusion(nn.Module):
    """Token features of a student, fused from the deepest to the shallowest block.

    ``steps[0]`` belongs to the deepest block.
    """

    distance = staticmethod(losses.token_review)

    def __init__(self, own: Sequence[int], other: Sequence[int]) -> None:
        """Widths of the student's and the teacher's tokens, shallow to deep."""
        super().__init__()
        widths = list(zip(own, other, strict=True))[::-1]
        self.steps = nn.ModuleList(TokenStep(d, to, fuse=i > 0) for i, (d, to) in enumerate(widths))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Student tokens, each [B, T, D_s], to fused tokens, each [B, T, D_t]; both shallow to deep."""
        fused, residual = [], None
        for step, x in zip(self.steps, reversed(features), strict=True):
            out, residual = step(x, residual)
            fused.append(out)
        return fused[::-1]


class TokenStep(nn.Module):
    """One block's fusion: the tokens and the deeper residual, mixed by learned elementwise gates.

    The gates pass no sigmoid. The deepest block has no residual, hence neither gate nor second norm.
    """

    def __init__(self, width: int, teacher_width: int, *, fuse: bool) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.norm_in = nn.LayerNorm(width)
        self.gate = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) if fuse else None
        self.norm_out = nn.LayerNorm(width) if fuse else None
        self.expand = nn.Linear(width, teacher_width)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm_in(self.project(x))
        if residual is not None and self.gate is not None and self.norm_out is not None:
            x = self.norm_out(x * self.gate(x) + residual * self.gate(residual))
        return self.expand(x), x


class MapFusion(nn.Module):
    """Maps of a student, fused from the deepest to the shallowest stage.

    ``steps[0]`` belongs to the deepest stage.
    """

    distance = staticmethod(losses.hcl)

    def __init__(self, own: Sequence[int], other: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        """Channels of student and teacher and the teacher's (height, width), shallow to deep."""
        super().__init__()
        middle = min(512, own[-1])
        stages = list(zip(own, other, sizes, strict=True))[::-1]
        self.steps = nn.ModuleList(
            MapStep(c, middle, to, size, fuse=i > 0) for i, (c, to, size) in enumerate(stages)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Student maps, each [B, C_s, h, w], to fused maps, each [B, C_t, H, W]; both shallow to deep."""
        fused, residual = [], None
        for step, x in zip(self.steps, reversed(features), strict=True):
            out, residual = step(x, residual)
            fused.append(out)
        return fused[::-1]


class MapStep(nn.Module):
    """Attention-based fusion (ABF) of one stage: spatial attention weighs the map and the residual."""

    def __init__(
        self, channels: int, middle: int, teacher_channels: int, size: tuple[int, int], *, fuse: bool
    ) -> None:
        super().__init__()
        self.size = size
        self.narrow = _convolution(channels, middle, 1)
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuse else None
        self.widen = _convolution(middle, teacher_channels, 3)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.narrow(x)
        if residual is not None and self.attention is not None:
            above = F.interpolate(residual, x.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([x, above], dim=1)).sigmoid()
            x = x * share[:, :1] + above * share[:, 1:]
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.widen(x), x


def _convolution(channels: int, wide: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, wide, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(wide))


def fusion(own: Sequence[Tensor], other: Sequence[Tensor]) -> TokenFusion | MapFusion:
    """The fusion that brings student features ``own`` to the shapes of ``other``, both shallow to deep.

    Raises:
        ShapeError: tokens among maps, student blocks of several widths, or different numbers of tokens.
    """
    ranks = {x.ndim for x in (*own, *other)}
    if ranks == {4}:
        sizes = [(x.shape[2], x.shape[3]) for x in other]
        return MapFusion([x.shape[1] for x in own], [x.shape[1] for x in other], sizes)
    if ranks != {3}:
        raise ShapeError(
            f"the tapped features have {sorted(ranks)} axes: "
            "tap tokens [B, T, D] everywhere, or maps [B, C, H, W]"
        )
    shapes, tokens = {x.shape[1:] for x in own}, {x.shape[1] for x in (*own, *other)}
    if len(tokens) > 1 or len(shapes) > 1:
        raise ShapeError(
            f"student and teacher blocks have {sorted(tokens)} tokens, the student's widths are "
            f"{sorted(s[1] for s in shapes)}: use equal patch grids, no extra token in one of them alone, "
            "and student blocks of one width"
        )
    return TokenFusion([x.shape[2] for x in own], [x.shape[2] for x in other])
