"""A small training that is about to begin, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Objective, Outputs, Selection
from limbeck.engine import seeds
from limbeck.engine.distillation import Distillation, combine
from limbeck.nets.taps import Tapped
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels

CLASSES, WIDTH = 3, 4


class Small:
    """A ``contracts.Course`` of 12 samples to learn from and 6 held out, in float64.

    Attributes:
        asked: numbers of the samples that the teacher was asked about.
        warned: what was warned of.
    """

    def __init__(self, student: nn.Module | None = None, teacher: bool = True) -> None:
        torch.manual_seed(3)
        own = nn.Linear(WIDTH, CLASSES) if student is None else student
        self.inputs = torch.randn(18, WIDTH, dtype=torch.float64)
        self.labels = torch.arange(18) % CLASSES
        self.index, self.held_out, self.classes = torch.arange(12), torch.arange(12, 18), CLASSES
        self.student: Net = Tapped(own).double()
        self.teacher: Net | None = (
            Tapped(nn.Linear(WIDTH, CLASSES)).double().eval().requires_grad_(False) if teacher else None
        )
        self.objectives: dict[str, Objective] = {"labels": Labels(), "kd": KD(weight=1, temperature=2)}
        if not teacher:
            self.objectives.pop("kd")
        self.noisy: Tensor | None = None
        self.labelled: Tensor | None = None
        self.asked: list[int] = []
        self.warned: list[str] = []

    def batch(self, index: Tensor) -> Batch:
        """One batch of these samples."""
        labelled = None if self.labelled is None else self.labelled[index]
        return Batch(
            inputs=self.inputs[index],
            labels=self.labels[index],
            index=index,
            view=0 * index,
            labelled=labelled,
        )

    def batches(self, index: Tensor, size: int = 5, view: int | None = None) -> Iterator[Batch]:
        """Batches in order."""
        return map(self.batch, index.split(size))

    def ask(self, batch: Batch) -> Outputs:
        """The teacher's answer."""
        assert self.teacher is not None
        self.asked += batch.index.tolist()
        return self.teacher(batch).detach()

    def generator(self, *names: object) -> torch.Generator:
        """See the contract."""
        return seeds.generator(0, *names)

    def probe(self, name: str, epochs: int, *, taught: bool = False, after: Any = None) -> Net:
        """The student itself, as if it had been trained."""
        return self.student.eval()

    def step(self, selection: Selection) -> Distillation:
        """See the contract."""
        seen = Outputs(torch.zeros(1, CLASSES))
        built = {name: objective.build(seen, seen) for name, objective in self.objectives.items()}
        ask = None if self.teacher is None else self.ask
        return Distillation(self.student, built, combine(self.objectives), ask=ask, selector=selection)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Computed each time."""
        return compute()

    def warn(self, text: str) -> None:
        """Kept in ``warned``."""
        self.warned.append(text)
