"""Tokens that can still be learnt: those where the draft lags most behind a reference of its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from limbeck.contracts import Batch, Course, Net, Outputs, Progress, Selection, Selector
from limbeck.errors import ConfigError, unknown
from limbeck.losses.chunked import chunked_items
from limbeck.losses.divergences import ForwardKL
from limbeck.losses.selective import Normalise, selection_weights
from limbeck.objectives._tokens import hidden_of, shared_vocabulary, taught


@dataclass(frozen=True, kw_only=True)
class AdaSPEC(Selector):
    """In each batch the tokens with the largest gap KL(target ‖ draft) - KL(target ‖ reference) (AdaSPEC).

    The student is the draft of speculative decoding, its teacher the target. The reference starts from the
    student's own weights and learns before it, from the same teacher on all tokens; then it stands still. The
    student is not asked to learn what that one cannot. It reads as many batches as without a selector: at a
    fraction of 0.4 it learns from 0.4 of the tokens that plain distillation takes.

    Attributes:
        asks: it compares what both say of the same tokens.
        fraction: share of each batch's tokens that counts, in (0, 1]; 1 = all.
        epochs: of the reference, as long ones as the student's; at least 1.
        normalise: ``selected`` takes the mean over the selected tokens; ``all`` divides their sum by all, as
            the official code does under trainers that tell the number of all.
        bottom: take the tokens with the smallest gap, to show that it matters which.

    Raises:
        ConfigError: a field out of its range, or no teacher.

    Source: AdaSPEC, NeurIPS 2025 (arXiv 2510.19779), algorithm 1 and official code (yuezhouhu/adaspec).
    """

    asks: ClassVar[bool] = True

    fraction: float = 0.4
    epochs: int = 1
    normalise: Normalise = "selected"
    bottom: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}: allowed are shares above 0, up to 1")
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}: allowed are values of at least 1")
        if self.normalise not in get_args(Normalise):
            raise unknown("normalise", self.normalise, get_args(Normalise))

    def prepare(self, course: Course) -> Selection:
        """Train the reference."""
        if course.teacher is None:
            raise ConfigError("selector adaspec compares with a target but teacher is none: name one")
        return Lagging(self, course.probe("reference", self.epochs, taught=True, same_start=True))


class Lagging(Selection):
    """``AdaSPEC`` with its reference.

    Attributes:
        seen: tokens that it was asked about.
        selected: how many of them counted.
        gap: sum of the gaps of all.
        chosen_gap: sum of the gaps of those that counted.
    """

    seen: Tensor
    selected: Tensor
    gap: Tensor
    chosen_gap: Tensor

    def __init__(self, plan: AdaSPEC, reference: Net) -> None:
        super().__init__(plan)
        self.plan, self._reference = plan, (reference.requires_grad_(False),)  # unregistered: a probe
        device = next(reference.parameters()).device
        for name in ("seen", "selected", "gap", "chosen_gap"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=device))

    @torch.no_grad()
    def weights(self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress) -> Tensor:
        """Weights [R]: 0 for the tokens that do not count."""
        assert teacher is not None
        (reference,) = self._reference
        gap = self.lag(student, teacher) - self.lag(reference(batch), teacher)
        ranked = -gap if self.plan.bottom else gap
        weights = selection_weights(ranked, self.plan.fraction, normalise=self.plan.normalise)
        self.count(gap, weights > 0)
        return weights

    def lag(self, student: Outputs, teacher: Outputs) -> Tensor:
        """KL(target ‖ student) of each token [R]."""
        own, vocabulary = hidden_of(student), shared_vocabulary(student, teacher)
        return chunked_items(own, ForwardKL(), taught(teacher), vocabulary=vocabulary)[1]

    def count(self, gap: Tensor, chosen: Tensor) -> None:
        """Keep account of what was selected."""
        self.seen += len(gap)
        self.selected += chosen.sum()
        self.gap += gap.sum()
        self.chosen_gap += torch.where(chosen, gap, 0).sum()

    def facts(self) -> dict[str, Any]:
        """How many tokens were learnt from, and the mean gap of all and of those, in nats.

        A plain distillation of equal steps learns from all ``tokens_seen``, one of as many token gradients
        stops after ``tokens_selected`` of them.
        """
        seen, selected = float(self.seen), float(self.selected)
        return {
            "tokens_seen": int(seen), "tokens_selected": int(selected), "share": selected / max(seen, 1),
            "gap": float(self.gap) / max(seen, 1), "gap_selected": float(self.chosen_gap) / max(selected, 1),
            "reference_epochs": self.plan.epochs, "budget": "equal steps",
        }  # fmt: skip
