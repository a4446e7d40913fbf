"""TRG: the relations between image parts, within an image and across the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.engine.seeds import generator
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives._shared import above, at_least, feature


@dataclass(frozen=True, kw_only=True)
class TRG(Objective):
    """Token relationship graph: tokens of the whole batch are nodes, likeness is edges (Zhang et al. 2023).

    Maps [B, C, H, W] are cut into patches; of the tokens [B, T, D] of a transformer those before the image
    patches are left out. Where the grids differ, the larger is pooled to the smaller, so that a convolutional
    teacher can teach a transformer. The three terms alone: ``labels`` and ``kd`` (temperature 4) stand
    beside them.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        alpha: factor of the contextual term, the likeness of an image's tokens among themselves, >= 0.
        beta: factor of the local term, each sampled token's neighbours in the batch, >= 0.
        gamma: factor of the global term, finding the teacher's token of the same place in the batch, >= 0.
        student_tap: module path of the student's map or tokens.
        teacher_tap: module path of the teacher's.
        student_prefix: tokens before the image patches (class token) in a transformer student.
        teacher_prefix: the same of a transformer teacher.
        patch: side of a patch of the map, in positions.
        sampled: tokens drawn from each image for the graphs, the same in both networks, new in each step.
        nodes: upper bound of the tokens in a graph: fewer are drawn from each image of a large batch, at
            least one.
        neighbours: edges that lead to a token, k.
        sigma: width of the edges' kernel on tokens of length 1, > 0.
        student_first: KL(student ‖ teacher) in the local term, as printed; else KL(teacher ‖ student).
        width: of the common space that both networks' tokens are projected to for the global term.
        warm: temperature of the global term at the start, > 0.
        cold: the same at the end; a cosine over the epochs lies between.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds no such feature, or grids that cannot be brought together.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), from a summary of its equations: no code was published,
    and weights, k, sigma, the sampling, the projections and the temperature's course are our own.
    Differs: local and global term are means over tokens, not sums, so that weights do not depend on the
    batch; tokens have length 1 in the local graph, or the kernel would be 0 for most maps.
    """

    zero_at_teacher: ClassVar[bool] = False

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.5
    student_tap: str = "blocks.-1"
    teacher_tap: str = "blocks.-1"
    student_prefix: int = 1
    teacher_prefix: int = 1
    patch: int = 1
    sampled: int = 8
    nodes: int = 1024
    neighbours: int = 8
    sigma: float = 1.0
    student_first: bool = True
    width: int = 64
    warm: float = 1.0
    cold: float = 0.1

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "student_prefix", "teacher_prefix"):
            at_least(name, getattr(self, name), 0)
        for name in ("patch", "sampled", "nodes", "neighbours", "width"):
            at_least(name, getattr(self, name), 1)
        for name in ("sigma", "warm", "cold"):
            above(name, getattr(self, name), 0)
        if self.cold > self.warm:
            raise ConfigError(f"cold is {self.cold} but warm is {self.warm}: the temperature falls, or stays")

    def needs(self) -> Needs:
        """One tap in each network; no teacher logits."""
        return Needs(student=(self.student_tap,), teacher=(self.teacher_tap,), teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The two projections of the global term, drawn from torch's global generator."""
        return TokenGraph(self, *self.tokens(student, teacher), facts.seed)

    def tokens(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The tokens of both networks at the same places: [B, n, D] and [B, n, D']."""
        own = grid(feature("student", student, self.student_tap), self.student_prefix)
        other = grid(feature("teacher", teacher, self.teacher_tap), self.teacher_prefix)
        own, other = same_grid(own, other)
        if self.patch > min(own.shape[2:]):
            raise ShapeError(
                f"patch is {self.patch} but the maps are {list(own.shape[2:])}: cut smaller patches, or tap "
                "earlier layers"
            )
        return losses.tokenise(own, self.patch), losses.tokenise(other.detach(), self.patch)

    def temperature(self, at: Progress) -> float:
        """The temperature of the global term in an epoch: from ``warm`` towards ``cold``."""
        fallen = (1 - math.cos(math.pi * at.epoch / max(1, at.epochs))) / 2
        return self.warm + (self.cold - self.warm) * fallen


class TokenGraph(nn.Module):
    """``TRG`` with its projections, which are there where the global term counts."""

    def __init__(self, objective: TRG, own: Tensor, other: Tensor, seed: int) -> None:
        super().__init__()
        self.objective, self.seed = objective, seed
        self.project: nn.ModuleList | None = None
        if objective.gamma:
            widths = (own.shape[2], other.shape[2])
            self.project = nn.ModuleList(nn.Linear(w, objective.width, bias=False) for w in widths)
            self.project.to(own.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        plan = self.objective
        own, other = (losses.full_precision(x) for x in plan.tokens(student, teacher))
        terms = {}
        if plan.alpha:
            terms["contextual"] = plan.alpha * losses.contextual(own, other, weights=batch.weight)
        if plan.beta or plan.gamma:
            drawn = sample_tokens(own, plan.sampled, plan.nodes, generator(self.seed, at.task, at.step))
            places = drawn[batch.index.argsort().argsort()]  # draws follow the samples, not their order
            own, other, weights = pick(own, places), pick(other, places), spread(batch.weight, places)
            if plan.beta:
                graphs = [
                    losses.knn_affinity(F.normalize(x, dim=-1), plan.neighbours, plan.sigma)
                    for x in (own, other)
                ]
                local = losses.local_graph(*graphs, student_first=plan.student_first, weights=weights)
                terms["local"] = plan.beta * local
            if self.project is not None:
                dtype = next(self.project.parameters()).dtype
                near, far = (p(x.to(dtype)) for p, x in zip(self.project, (own, other), strict=True))
                found = losses.global_graph(near, far, plan.temperature(at), weights=weights)
                terms["global"] = plan.gamma * found
        return terms


def grid(feature: Tensor, prefix: int) -> Tensor:
    """``feature`` as a map: maps [B, C, H, W] as they are, tokens [B, T, D] without their prefix.

    A square number of tokens becomes a square map, any other a single row [B, D, 1, T].
    """
    if feature.ndim == 4:
        return feature
    patches = feature[:, prefix:].mT
    images, width, count = patches.shape
    side = math.isqrt(count)
    return patches.reshape(images, width, *((side, side) if side * side == count else (1, count)))


def same_grid(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the size of the smaller one.

    Raises:
        ShapeError: there is no token, or neither map is the smaller one in both directions.
    """
    sizes = tuple(own.shape[2:]), tuple(other.shape[2:])
    small = min(sizes[0][0], sizes[1][0]), min(sizes[0][1], sizes[1][1])
    if small not in sizes or 0 in small:
        raise ShapeError(
            f"the student's tokens form {list(sizes[0])} but the teacher's {list(sizes[1])}: tap grids of "
            "one aspect ratio, and let student_prefix and teacher_prefix count the tokens before the image's"
        )
    pooled = [x if x.shape[2:] == small else F.adaptive_avg_pool2d(x, small) for x in (own, other)]
    return pooled[0], pooled[1]


def sample_tokens(tokens: Tensor, count: int, most: int, draws: torch.Generator) -> Tensor:
    """Places of the tokens of each image that a graph is made of: [B, m] int64, without repetition.

    Args:
        tokens: [B, n, D]; shape and device count.
        count: m, or n where that is less.
        most: bound of B · m, which lowers m to no less than 1.
        draws: where the places come from.
    """
    images, each, _ = tokens.shape
    drawn = torch.rand(images, each, generator=draws).argsort(-1)
    return drawn[:, : min(count, each, max(1, most // images))].to(tokens.device)


def pick(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens [B · m, D] of all images at ``places`` [B, m]."""
    wide = places[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, wide).flatten(0, 1)


def spread(weight: Tensor | None, places: Tensor) -> Tensor | None:
    """Each image's weight [B] for each of its tokens: [B · m]."""
    return None if weight is None else weight.repeat_interleave(places.shape[1])
