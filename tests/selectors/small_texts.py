"""A small training on texts: whole runs of a few seconds, and a course in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import config, plain
from limbeck.config import Recipe
from limbeck.contracts import Batch, Net, Outputs, Unembedding
from limbeck.engine import seeds
from limbeck.engine.run import Run
from limbeck.scenarios.course import Lessons
from limbeck.scenarios.language import Desk

VOCABULARY, LENGTH, WIDTH = 7, 5, 4


def recipe(folder: Path, *sets: str) -> Recipe:
    """Products and letters' names into a transformer of eight numbers, ten steps in two epochs."""
    given: dict[str, Any] = {
        "name": "small",
        "teacher": {"name": "trained", "network": {"name": "llama", "layers": 1, "width": 12, "heads": 2}},
        "student": {"name": "llama", "layers": 1, "width": 8, "heads": 2},
        "objective": [{"name": "divergence"}],
        "scenario": {
            "name": "language", "epochs": 2, "epoch_steps": 5, "batch_size": 8, "eval_rows": 8,
            "optim": {"name": "adamw", "lr": 0.01, "schedule": "cosine"},
        },
        "data": {"name": "python_texts", "domains": ["sums", "names"], "shares": [0.2, 0.05], "length": 24},
        "engine": {
            "threads": 1, "checkpoint_seconds": 1000, "reuse_teachers": False, "log_every": 2,
            "cache_root": str(folder / "caches"),
        },
    }  # fmt: skip
    for item in sets:
        given = plain.override(given, item)
    return config.build(given)


def course(folder: Path, *sets: str) -> Lessons:
    """What a selector of such a run is prepared with; the teacher has not learnt."""
    asked = recipe(folder, *sets)
    run = Run(folder / "run", asked.engine, asked.seed, quiet=True)
    plan: Any = asked.scenario
    desk = Desk(plan, asked, run)
    desk.pair.teach(False)
    return Lessons(
        desk.pair, desk.everything, desk.learning, desk.held_out, plan.optim, steps=plan.epoch_steps
    )


class Bigram(Net):
    """A language model that sees the last token alone.

    Attributes:
        asked: how many batches it was asked about.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=draws))
        self.head = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=draws))
        self.asked = 0

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        self.asked += 1
        hidden = batch.counted(self.embedding[batch.inputs])
        return Outputs(torch.empty(len(hidden), 0), hidden=hidden, unembedding=Unembedding(self.head))


class Texts:
    """A ``contracts.Course`` of 40 rows to learn from and 10 held out, of two domains.

    Attributes:
        kept: what was computed once.
    """

    def __init__(self, domains: int = 2, epoch_samples: int = 64) -> None:
        draws = torch.Generator().manual_seed(4)
        self.ids = torch.randint(VOCABULARY, (50, LENGTH + 1), generator=draws)
        self.labels = torch.arange(50) % (4 if domains > 1 else 1)
        self.labels = torch.where(self.labels == 3, 1, 0)  # a quarter of domain 1
        self.index, self.held_out = torch.arange(40), torch.arange(40, 50)
        self.student: Net = Bigram(1)
        self.teacher: Net | None = Bigram(2)
        self.epoch_samples, self.kept = epoch_samples, dict[str, Any]()

    def batch(self, index: Tensor) -> Batch:
        """Rows of five tokens, of which the first one's next does not count."""
        said = self.ids[index, 1:].flatten()
        rows = torch.arange(len(said)).reshape(-1, LENGTH)[:, 1:].flatten()
        return Batch(inputs=self.ids[index, :-1], labels=said[rows], index=index, view=0 * index, rows=rows)

    def batches(self, index: Tensor, size: int = 4) -> Iterator[Batch]:
        """Batches in order."""
        return map(self.batch, index.split(size))

    def ask(self, batch: Batch) -> Outputs:
        """The teacher's answer."""
        assert self.teacher is not None
        return self.teacher(batch).detach()

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """See the contract."""
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]

    def generator(self, *names: object) -> torch.Generator:
        """See the contract."""
        return seeds.generator(0, *names)
