"""Contrastive representation distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.engine.seeds import generator as seeded
from limbeck.errors import ConfigError, GuardError, ShapeError
from limbeck.objectives._shared import above, as_vector, at_least, feature

FAR = 2**62  # draws lie below it; what is left of them after the division by N favours no sample


@dataclass(frozen=True, kw_only=True)
class CRD(Objective):
    """Contrastive representations: both networks agree on a sample, among many others (Tian et al. 2020).

    Both pooled features are embedded by a learned linear map. A memory holds the last embeddings of all
    samples of the data, of both networks. Each sample's student embedding must fit the teacher's memory of
    that sample better than that of samples of other classes, and the reverse. The normalising constants are
    set at the first batch and stay.

    Reads ``batch.index`` and one feature of each network: vectors [B, D]; the mean of a map [B, C, H, W]; of
    tokens [B, T, D] the class token, or without one their mean. Beside it stands ``labels`` at weight 1.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        negatives: K, how many samples of other classes each sample is set against.
        width: D of the embeddings.
        temperature: > 0.
        momentum: share of what was remembered in the new memory, in [0, 1).
        student_tap: module path of the student's feature.
        teacher_tap: module path of the teacher's feature.

    Raises:
        ConfigError: a field out of its range; samples of one class alone, or hidden labels.
        ShapeError: ``build`` finds no such feature, tokens that cannot be pooled, or no samples.

    Source: Tian, Krishnan, Isola, ICLR 2020 (arXiv 1910.10699), eq. 17 to 19; constants of the official code.
    Differs: negatives are drawn with replacement, as the paper's noise distribution says; the official code
    draws without where it can.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 0.8
    negatives: int = 16384
    width: int = 128
    temperature: float = 0.07
    momentum: float = 0.5
    student_tap: str = "blocks.-1"
    teacher_tap: str = "blocks.-1"

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("negatives", self.negatives, 1)
        at_least("width", self.width, 1)
        above("temperature", self.temperature, 0)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum} but must lie in [0, 1)")

    def needs(self) -> Needs:
        """One tap in each network; no teacher logits."""
        return Needs(student=(self.student_tap,), teacher=(self.teacher_tap,), teacher_logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """The embeddings, drawn from torch's global generator, and the memory, drawn from ``facts.seed``."""
        own = as_vector(feature("student", student, self.student_tap))
        other = as_vector(feature("teacher", teacher, self.teacher_tap))
        if facts.samples < 1:
            raise ShapeError(
                "crd remembers every sample of the data, but it was told of none: give tensors or a data "
                "set, no loader"
            )
        return Contrast(self, own.shape[1], other.shape[1], facts).to(own.device)


class Contrast(nn.Module):
    """``CRD`` with its embeddings and its memory.

    Attributes:
        student_memory: the student's embeddings [N, D] as last seen.
        teacher_memory: the teacher's.
        constants: [2], what the likelihoods under the teacher's and the student's memory are divided by;
            0 = not set yet.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    constants: Tensor
    pool: Tensor
    first: Tensor
    alike: Tensor

    def __init__(self, objective: CRD, own: int, other: int, facts: Facts) -> None:
        super().__init__()
        self.objective, self.samples, self.seed = objective, facts.samples, facts.seed
        self.embed_student = nn.Linear(own, objective.width)
        self.embed_teacher = nn.Linear(other, objective.width)
        draws, reach = seeded(facts.seed, "memory"), math.sqrt(3 / objective.width)
        for name in ("student_memory", "teacher_memory"):
            rows = torch.rand(facts.samples, objective.width, generator=draws)
            self.register_buffer(name, reach * (2 * rows - 1))
        self.register_buffer("constants", torch.zeros(2))
        for name in ("pool", "first", "alike"):  # what `start` is told, and told again after a resume
            self.register_buffer(name, torch.empty(0, dtype=torch.int64), persistent=False)

    def start(self, index: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Learn which samples [n] a stage goes over: negatives are drawn among them alone."""
        pool = index[labels[index].argsort(stable=True)]
        classes, counts = labels[pool], torch.bincount(labels[pool])
        if int((counts > 0).sum()) < 2:
            raise ConfigError(
                f"crd sets samples against those of other classes, but all {len(pool)} have class "
                f"{int(classes[0])}: give every task two classes or more"
            )
        first, alike = (torch.zeros(self.samples, dtype=torch.int64) for _ in range(2))
        first[pool], alike[pool] = (counts.cumsum(0) - counts)[classes], counts[classes]
        device = self.constants.device
        self.pool, self.first, self.alike = pool.to(device), first.to(device), alike.to(device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        choice, dtype = self.objective, self.embed_student.weight.dtype
        own = as_vector(feature("student", student, choice.student_tap))
        other = as_vector(feature("teacher", teacher, choice.teacher_tap)).detach()
        own, other = self.embed_student(own.to(dtype)), self.embed_teacher(other.to(dtype))
        own, other = (F.normalize(losses.full_precision(x), dim=1) for x in (own, other))
        sides = [
            losses.noise_contrast(fits, self.samples, weights=batch.weight)
            for fits in self.fits(own, other, self.chosen(batch, at))
        ]
        self.remember(own, other, batch.index)
        return {"crd": choice.weight * torch.stack(sides).sum()}

    def chosen(self, batch: Batch, at: Progress) -> Tensor:
        """Each sample [B], and after it K samples of other classes: [B, 1 + K] rows of the memory.

        The draws follow from seed, task, step and the order of ``batch.index``, not from places in the batch.
        """
        if batch.labelled is not None:
            raise ConfigError(
                "crd takes its negatives from other classes, so it must read all labels: use data without "
                "hidden labels"
            )
        if not len(self.pool):
            raise GuardError("crd was not told which samples the stage goes over: call start() before it")
        index, shape = batch.index, (len(batch.index), self.objective.negatives)
        draws = torch.randint(FAR, shape, generator=seeded(self.seed, "negatives", at.task, at.step))
        draws = draws.to(index.device)[index.argsort().argsort()]
        first, alike = self.first[index, None], self.alike[index, None]
        place = draws % (len(self.pool) - alike)
        return torch.cat([index[:, None], self.pool[place + alike * (place >= first)]], dim=1)

    def fits(self, own: Tensor, other: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised likelihoods [B, 1 + K]: of the student's embeddings under the teacher's memory, and the
        reverse. The first call sets the constants."""
        sides = (own, self.teacher_memory), (other, self.student_memory)
        raw = [losses.likelihoods(e, memory, chosen, self.objective.temperature) for e, memory in sides]
        with torch.no_grad():
            seen = self.samples * torch.stack([x.mean() for x in raw]).to(self.constants.dtype)
            self.constants.copy_(torch.where(self.constants > 0, self.constants, seen))
        constants = self.constants.clone()
        return raw[0] / constants[0], raw[1] / constants[1]

    @torch.no_grad()
    def remember(self, own: Tensor, other: Tensor, index: Tensor) -> None:
        """Draw both memories of the samples ``index`` [B] towards their embeddings [B, D]."""
        for memory, embedding in ((self.student_memory, own), (self.teacher_memory, other)):
            memory.index_copy_(0, index, losses.remembered(memory[index], embedding, self.objective.momentum))
