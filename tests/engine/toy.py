"""The smallest things that ``fit`` takes: a linear student, eight samples, a run in a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Progress
from limbeck.engine.fit import Turn
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine

SAMPLES, BATCH = 8, 2
INPUTS = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
SGD = Optim(name="sgd", lr=0.1, momentum=0.9, schedule="constant")


class Source:
    """The samples in an order of each epoch."""

    def __init__(self, inputs: Tensor = INPUTS) -> None:
        self.inputs, self.steps = inputs, SAMPLES // BATCH

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for part in order.split(BATCH)[start:]:
            yield Batch(inputs=self.inputs[part], labels=part % 2, index=part, view=0 * part)


class Step(nn.Module):
    """A student with noise of its own; two terms, of which the second can be spoilt at a step."""

    def __init__(self, spoilt: tuple[int, ...] = (), small: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.student = nn.Linear(3, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.spoilt, self.small = spoilt, small

    def forward(self, batch: Batch, at: Progress) -> dict[str, Tensor]:
        said = self.student(batch.inputs + 0.1 * torch.randn_like(batch.inputs))
        second = said.square().mean() * (float("nan") if at.step in self.spoilt else self.small)
        return {"labels": nn.functional.cross_entropy(said.float(), batch.labels), "size": second}


def run(folder: Path, *, resume: bool = False, **settings: Any) -> Run:
    """A run that says nothing and does not save by the clock."""
    return Run(folder, Engine(**{"checkpoint_seconds": 1000, **settings}), 0, resume=resume, quiet=True)


def turn(module: nn.Module, optim: Optim = SGD, **frozen: nn.Module) -> Turn:
    return Turn("student", module, optim, frozen)


def log(folder: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's log."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("[0-9]*.json"))


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Nothing of ``module`` is updated within."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
