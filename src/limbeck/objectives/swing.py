"""Private tokens at a high temperature, so that the student does not learn them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.data.tokens import PRIVACY
from limbeck.engine.seeds import derive
from limbeck.errors import ConfigError, unknown
from limbeck.losses.swing import StudentSide, gaussian_noise, laplace_noise, swing_loss, token_temperature
from limbeck.objectives._shared import above, at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class Swing(Objective):
    """Swing distillation: each token has a temperature that rises with how private it is, without T².

    At a high temperature the teacher's target is nearly even, and the gradient of that token falls as 1 / T².
    How private a token is the data says: ``data.private``. The cross entropy of the labels would give away
    what the temperature hides; where it is wanted, take ``labels`` here, not the objective of that name.
    Holds the logits of both networks for all tokens of a batch.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        texts: it matches language models alone.
        reads_privacy: it reads how private the data says that each token is.
        weight: factor of the divergence, >= 0.
        t_low: temperature of a token that is not private, > 0.
        t_high: of one that surely is, >= ``t_low``; 2 to 50.
        sigma: deviation of the normal noise on the teacher's probabilities, >= 0; 0.001 to 0.01.
        epsilon: budget > 0 of one token's distribution, for Laplace noise of scale 2 / ``epsilon`` in place
            of the normal one; None = none.
        student_side: ``same`` divides the student's logits by the token's temperature too, ``target_only`` by
            ``t_low``.
        t_squared: multiply each token's divergence by its T², as Hinton's loss has it: that gives the secrets
            away, and is here to show it.
        labels: factor of the cross entropy, >= 0, in which a token counts by 1 - its privacy.

    Raises:
        ConfigError: a field out of its range; ``terms`` with data that marks no private tokens.
        ShapeError: ``build`` finds different vocabularies.

    Source: Li et al. (arXiv 2212.08349), after its abstract.
    Differs: the formulas are our reading of what the abstract fixes (see ``losses.swing``). No guarantee of
    differential privacy is made.
    """

    zero_at_teacher: ClassVar[bool] = True
    texts: ClassVar[bool] = True
    reads_privacy: ClassVar[bool] = True

    weight: float = 1.0
    t_low: float = 1.0
    t_high: float = 10.0
    sigma: float = 0.0
    epsilon: float | None = None
    student_side: StudentSide = "same"
    t_squared: bool = False
    labels: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "sigma", "labels"):
            at_least(name, getattr(self, name), 0)
        if self.epsilon is not None:
            above("epsilon", self.epsilon, 0)
            if self.sigma:
                raise ConfigError(
                    f"sigma is {self.sigma} and epsilon {self.epsilon}: take one of the two noises"
                )
        token_temperature(torch.zeros(()), self.t_low, self.t_high)
        if self.student_side not in get_args(StudentSide):
            raise unknown("student_side", self.student_side, get_args(StudentSide))

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the vocabularies are compared."""
        same_classes(student, teacher)
        return Swinging(self, facts.seed)


class Swinging(nn.Module):
    """``Swing`` with the seed of its noise."""

    def __init__(self, plan: Swing, seed: int) -> None:
        super().__init__()
        self.plan, self.seed = plan, seed

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"divergence": ..., "labels": ...}``, the latter where it is asked for."""
        plan = self.plan
        if PRIVACY not in batch.marks:
            raise ConfigError(
                "objective swing reads how private each token is, but the data does not say: "
                "set data.private, to [digits, email] for example"
            )
        score = batch.marks[PRIVACY]
        items = swing_loss(
            student.soft, teacher.logits, score, noise=self.noise(teacher.logits, at), t_low=plan.t_low,
            t_high=plan.t_high, student_side=plan.student_side, weights=batch.weight, reduction="none",
        )  # fmt: skip
        if plan.t_squared:
            items = items * token_temperature(score, plan.t_low, plan.t_high).square()
        terms = {"divergence": plan.weight * losses.reduce(items)}
        if plan.labels:
            public = 1 - score if batch.weight is None else batch.weight * (1 - score)
            hard = losses.cross_entropy(student.logits, batch.labels, weights=public)
            terms["labels"] = plan.labels * hard
        return terms

    def noise(self, logits: Tensor, at: Progress) -> Tensor | None:
        """Noise [R, V] for a step's targets: a function of seed and step alone."""
        plan = self.plan
        if not plan.sigma and plan.epsilon is None:
            return None
        seed = derive(self.seed, "noise", at.task, at.step)
        draws = torch.Generator(device=logits.device).manual_seed(seed)
        if plan.epsilon is not None:
            return laplace_noise(logits, plan.epsilon, draws)
        return gaussian_noise(logits, plan.sigma, draws)
