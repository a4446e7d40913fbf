"""Which images of a pool count, by what teacher and student together are sure of."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from limbeck.contracts import Course, Selection, Selector
from limbeck.errors import ConfigError
from limbeck.losses.kd3 import UNTIL, alpha_schedule, select_instances


@dataclass(frozen=True, kw_only=True)
class KD3Selector(Selector):
    """Before each epoch keeps the images on which the mixed prediction is sure enough for its class.

    The teacher's share of the mixed logits falls from 1 to 0 until epoch ``until``; then the student decides
    alone. A class that is predicted rarely has a lower threshold. Both networks see the whole pool as the
    epoch shows it, augmented, in evaluation mode. Labels are not read.

    The number of images differs from epoch to epoch: set ``equal_steps`` in scenario ``static``, or take a
    schedule that counts epochs (``multistep``).

    Attributes:
        cut: threshold of the most frequent class, in (0, 1).
        until: epoch, counted from 1, from which on the student decides alone: half of all epochs (120 of 240
            in the paper).
        least: where fewer images are kept, the so many surest are taken, and the run warns.

    Raises:
        ConfigError: a field out of its range, or no teacher.

    Source: Tang et al., ICCV 2023 (arXiv 2307.11469), official code.
    Differs: the student is asked without a graph; where nothing is kept the surest are taken.
    """

    cut: float = 0.95
    until: int = UNTIL
    least: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.cut < 1:
            raise ConfigError(f"cut is {self.cut}: allowed are thresholds between 0 and 1")
        for name in ("until", "least"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")

    def prepare(self, course: Course) -> Selection:
        """The selector with both networks at hand."""
        if course.teacher is None:
            raise ConfigError("selector kd3 asks teacher and student but teacher is none: name a teacher")
        return Instances(self, course)


class Instances(Selection):
    """``KD3Selector`` at work."""

    def __init__(self, selector: KD3Selector, course: Course) -> None:
        super().__init__(selector)
        self.choice, self.course = selector, course

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """The images worth a step in ``epoch``, from both networks as they stand before it."""
        found = self.course.once(f"kd3-{epoch}", lambda: self._selected(index, epoch))
        return torch.tensor(found, dtype=torch.int64)

    def facts(self) -> dict[str, Any]:
        """How many images each epoch kept, also those before a resumed run went on."""
        kept: list[int] = []
        with suppress(LookupError):
            while True:
                kept.append(len(self.course.once(f"kd3-{len(kept)}", _no_more)))
        return {"pool": len(self.course.index), "kept": kept}

    def _selected(self, index: Tensor, epoch: int) -> list[int]:
        student, teacher = self._said(index, epoch)
        alpha = alpha_schedule(epoch + 1, self.choice.until)
        keep, sure, *_ = select_instances(student, teacher, alpha, self.choice.cut)
        least = min(self.choice.least, len(index))
        if int(keep.sum()) < least:
            self.course.warn(
                f"epoch {epoch}: only {int(keep.sum())} of {len(index)} images are sure enough; the {least} "
                "surest are taken"
            )
            keep = torch.zeros_like(keep)
            keep[sure.argsort(descending=True, stable=True)[:least]] = True
        kept: list[int] = index[keep.cpu()].tolist()
        return kept

    @torch.no_grad()
    def _said(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Logits [N, C] of both networks over the epoch's view of the pool."""
        net = self.course.student
        learning = net.training
        net.eval()
        own, other = [], []
        for batch in self.course.batches(index, view=epoch):
            told = self.course.ask(batch)
            own.append(net(batch, teacher=told).logits)
            other.append(told.logits)
        net.train(learning)
        return torch.cat(own), torch.cat(other)


def _no_more() -> NoReturn:
    raise LookupError("no epoch after the last")
