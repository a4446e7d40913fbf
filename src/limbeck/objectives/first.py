"""The teacher's few most probable tokens, re-calibrated, as the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from limbeck.contracts import NO_FACTS, Batch, Course, Facts, Needs, Objective, Outputs, Progress
from limbeck.errors import ConfigError, GuardError, unknown
from limbeck.losses.chunked import chunked
from limbeck.losses.divergences import ForwardKL
from limbeck.losses.first import Scaling, label_smooth, linear_normalise, recalibrate, target_with_rest
from limbeck.losses.top_tokens import TopTokens
from limbeck.metrics.calibration import choose_temperature
from limbeck.objectives._shared import above, at_least
from limbeck.objectives._tokens import hidden_of, top_of


@dataclass(frozen=True, kw_only=True)
class FIRST(Objective):
    """Efficient trustworthy distillation: the teacher's top tokens, whose probabilities are re-calibrated.

    A teacher that was asked before needs no more than these few numbers a token: ``engine.cache_top_k``. The
    re-calibration undoes what fine-tuning did: a teacher that is too sure of itself teaches that too.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        texts: it matches language models alone.
        weight: factor of the term, >= 0.
        k: how many tokens are kept, >= 2.
        scaling: of their probabilities: ``linear`` as they are, ``power`` (an ordinary temperature) or
            ``probability`` (a softmax over probabilities, as the official code has it).
        c: temperature > 0 of the latter two. None = that of ``grid`` at which the teacher's calibration error
            on the validation part is smallest, the first of equals; chosen before the student's training.
        grid: the temperatures to choose from; where the result says ``c_at_the_end_of_grid``, a wider one may
            hold a better one.
        bins: of the calibration error.
        delta: label smoothing in place of a temperature, >= 0: taken from the first probability and shared
            among the others; 0 = none; the official code's is 0.1.
        rest: all other tokens are one more outcome of both networks. Without it the student is free to put
            any mass elsewhere, and only one that is trained already should be matched so.

    Raises:
        ConfigError: a field out of its range; ``prepare`` without validation samples.

    Source: FIRST, EMNLP 2024 (arXiv 2408.12168); formulas of its official code (SHUMKASHUN/FIRST).
    Differs: the mean runs over tokens, not sequences. The rest is an outcome by default, and a logarithm is
    taken of it, as the official code means to. Nothing is added to the student's probabilities. ``power`` is
    an addition.
    """

    zero_at_teacher: ClassVar[bool] = True
    texts: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    weight: float = 1.0
    k: int = 5
    scaling: Scaling = "linear"
    c: float | None = None
    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
    bins: int = 10
    delta: float = 0.0
    rest: bool = True

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("delta", self.delta, 0)
        for name, low in (("k", 2), ("bins", 1)):
            at_least(name, getattr(self, name), low)
        if self.scaling not in get_args(Scaling):
            raise unknown("scaling", self.scaling, get_args(Scaling))
        if not self.grid:
            raise ConfigError("grid is empty: give at least one temperature")
        for name, values in (("c", (self.c,)), ("grid", self.grid)):
            for value in values:
                if value is not None:
                    above(name, value, 0)
        if self.delta and self.scaling != "linear":
            raise ConfigError(
                f"delta is {self.delta} and scaling {self.scaling}: smooth labels or scale them, not both"
            )

    def needs(self) -> Needs:
        """What the teacher says of the next token; no logits."""
        return Needs(logits=False, tokens=self.k)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """What finds the temperature."""
        return Trusted(self)

    def target(self, probs: Tensor, c: float) -> Tensor:
        """The re-calibrated probabilities [..., K] of the kept ones, the largest first.

        With the rest they sum to what they sum to; else to 1.
        """
        if self.delta:
            kept = label_smooth(probs, self.delta)
            return kept if self.rest else linear_normalise(kept)
        if self.rest:
            return target_with_rest(probs, self.scaling, c)[..., :-1]
        return recalibrate(probs, self.scaling, c)


class Trusted(nn.Module):
    """``FIRST`` with its temperature.

    Attributes:
        c: the temperature; None = not chosen yet.
    """

    def __init__(self, plan: FIRST) -> None:
        super().__init__()
        self.plan = plan
        self.c = 1.0 if plan.scaling == "linear" else plan.c
        self.found: dict[str, Any] = {}

    def prepare(self, course: Course) -> None:
        """Look at the teacher's answers on the validation part, and choose the temperature where none is set.

        Raises:
            ConfigError: a temperature is to be chosen, but nothing is kept for validation.
        """
        if not len(course.held_out):
            if self.c is None:
                raise ConfigError(
                    "objective first chooses c on the validation part, which is empty: "
                    "raise data.validation, or set c"
                )
            return
        self.found = course.once("first", lambda: self.looked_at(course))
        self.c = self.found.get("c", self.c)

    @torch.no_grad()
    def looked_at(self, course: Course) -> dict[str, Any]:
        """How much of the teacher's probability is kept, and the calibration errors of the grid."""
        plan, probs, answers = self.plan, [], []
        for batch in course.batches(course.held_out):
            ids, log_probs = top_of(course.ask(batch), plan.k)
            right = ids == batch.labels[:, None]
            probs.append(log_probs.exp().cpu())
            answers.append(torch.where(right.any(1), right.int().argmax(1), -1).cpu())
        kept = torch.cat(probs)
        found: dict[str, Any] = {"coverage": float(kept.sum(1).double().mean())}
        if self.c is None:
            chosen = choose_temperature(
                kept, torch.cat(answers), plan.grid, scaling=plan.scaling, bins=plan.bins
            )
            found |= {
                "c": chosen.c,
                "c_at_the_end_of_grid": chosen.c in (min(plan.grid), max(plan.grid)),
                "errors": errors_by(plan.grid, chosen.errors),
            }
        return found

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"first": weight * KL(re-calibrated teacher ‖ student)}``, over the kept tokens and the rest."""
        if self.c is None:
            raise GuardError("first has no temperature yet: call prepare() before the training, or set c")
        ids, log_probs = top_of(teacher, self.plan.k)
        target = self.plan.target(log_probs.exp(), self.c).log()
        found = chunked(
            hidden_of(student), ForwardKL(), TopTokens(ids, target, tail=self.plan.rest), weights=batch.weight
        )
        return {"first": self.plan.weight * found.loss}

    def facts(self) -> dict[str, Any]:
        """The temperature, the calibration error at each of the grid, and the mass of the kept tokens."""
        return {"c": self.c, **self.found}


def errors_by(grid: Sequence[float], errors: Sequence[float]) -> dict[str, float]:
    """Calibration errors by temperature, as plain data."""
    return {f"{c:g}": error for c, error in zip(grid, errors, strict=True)}
