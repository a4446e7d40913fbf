"""A target that moves from the student's own prediction to the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.contracts import NO_FACTS, Batch, Facts, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.losses.chunked import chunked
from limbeck.losses.divergences import token_divergence
from limbeck.losses.taid import TAID, TAIDState, taid_update
from limbeck.objectives._shared import above, at_least, same_classes
from limbeck.objectives._tokens import hidden_of, shared_vocabulary, taught

POINTS = 10  # of the way of t that is reported


@dataclass(frozen=True, kw_only=True)
class TAIDObjective(Objective):
    """Temporally adaptive interpolated distillation: the logits of both networks are mixed into the target.

    p_t = softmax((1 - t) · stopgrad(student) + t · teacher). t grows from ``t_start`` to ``t_end``: along a
    line at least, and faster while the loss falls. Nothing learns along p_t. Of language models it reads
    hidden states and last layer, or the teacher's most probable tokens; of others logits.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        t_start: where t starts, in [0, 1]; 0.4 for Phi-3 to TinyLlama, 0.2 in the other scripts.
        t_end: where t ends, in [``t_start``, 1].
        alpha: step size of t, >= 0. Below about 2 (t_end - t_start) / (steps (1 - t_start)) the line is ahead
            all the time and nothing adapts: a short training needs more than the paper's 5e-4.
        beta: momentum of the loss's relative drop, in [0, 1).
        adaptive: False = t is the line.

    Raises:
        ConfigError: a field out of its range.

    Source: Shing et al., ICLR 2025 (arXiv 2501.16937), algorithm 1 and official code (SakanaAI/TAID).
    Differs: a loss that is not finite leaves t alone; t starts anew with each stage.
    """

    zero_at_teacher: ClassVar[bool] = False

    weight: float = 1.0
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("alpha", self.alpha, 0)
        above("t_end", self.t_end, 0)
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise ConfigError(
                f"t_start is {self.t_start} and t_end {self.t_end}: allowed are 0 <= t_start <= t_end <= 1"
            )
        if not 0 <= self.beta < 1:
            raise ConfigError(f"beta is {self.beta} but must lie in [0, 1)")

    def needs(self) -> Needs:
        """What the teacher says; of language models no logits."""
        return Needs(logits=False)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """What remembers t."""
        if student.hidden is None:
            same_classes(student, teacher)
        return Interpolation(self)


class Interpolation(nn.Module):
    """``TAIDObjective`` with its state, which a checkpoint keeps.

    Attributes:
        t: how far the target is on its way.
        momentum: moving average of the relative drop of the loss.
        previous: the loss of the step before.
        step: by how much the last update wanted to move t.
        refused: updates that were not made because the loss was not finite.
        way: t [10] at the end of each tenth of the stage; -1 where it has not come so far.
    """

    t: Tensor
    way: Tensor

    def __init__(self, plan: TAIDObjective) -> None:
        super().__init__()
        self.plan = plan
        for name, value in TAIDState.begin(plan.t_start)._asdict().items():
            self.register_buffer(name, value.clone())
        self.register_buffer("way", torch.full((POINTS,), -1.0))

    @property
    def state(self) -> TAIDState:
        """The state between two steps."""
        return TAIDState(*(self.get_buffer(name) for name in TAIDState._fields))

    def start(self, index: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Begin a stage: t is back at its start."""
        self.remember(TAIDState.begin(self.plan.t_start))
        self.way.fill_(-1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"taid": weight * cross entropy under p_t}``; in training t moves on afterwards."""
        target = TAID(self.t.clone())
        if student.hidden is None:
            loss = token_divergence(
                target, student.soft, teacher.logits, mask=student.mask, weights=batch.weight
            )
        else:
            loss = chunked(
                hidden_of(student), target, taught(teacher), weights=batch.weight,
                vocabulary=shared_vocabulary(student, teacher),
            ).loss  # fmt: skip
        if self.training:
            self.advance(loss, at, len(batch.labels))
        return {"taid": self.plan.weight * loss}

    @torch.no_grad()
    def advance(self, loss: Tensor, at: Progress, counted: int) -> None:
        """Move t by what the step's loss was."""
        plan = self.plan
        self.remember(
            taid_update(
                self.state, loss, at.step, at.steps, t_start=plan.t_start, t_end=plan.t_end,
                alpha=plan.alpha, beta=plan.beta, adaptive=plan.adaptive, counted=counted,
            )
        )  # fmt: skip
        self.way[POINTS * at.step // at.steps].copy_(self.t)

    def remember(self, state: TAIDState) -> None:
        """Keep ``state`` in the buffers."""
        for kept, value in zip(self.state, state, strict=True):
            kept.copy_(value)

    def facts(self) -> dict[str, Any]:
        """t at the end and on its way there, and how many losses were refused."""
        way = [None if t < 0 else t for t in self.way.tolist()]
        return {"t": float(self.t), "way": way, "refused": int(self.get_buffer("refused"))}
