"""A teacher and a student in the middle of a stream, as the benchmarks use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from limbeck import config
from limbeck.contracts import Batch, Spec
from limbeck.data.batches import Batches
from limbeck.data.stream import Stream
from limbeck.data.views import Views
from limbeck.engine.run import Run
from limbeck.scenarios.pair import Pair

TASK = 1  # the second: the components of an earlier task are there, and frozen
SHIPPED = "cdl-kdp"
PAPER = "cdl-kdp-vit-b-s-cifar100"  # the paper's sizes, for small images and with random weights


def random_weights(student: str, teacher: str) -> list[str]:
    """Overrides that put random networks in the place of pretrained ones, on data that is always there."""
    return [
        f"student.backbone={student}", "student.pretrained=false",
        f"teacher.backbone={teacher}", "teacher.pretrained=false",
        "data=digits", "scenario.tasks=5",
    ]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A pair of networks on the stream's second task.

    Attributes:
        recipe: names both networks and what is matched.
        sets: overrides of the recipe.
        size: side of the images in pixels.
        batch: samples per step.
        samples: how many of the task's samples are gone over.
    """

    recipe: str
    sets: Sequence[str]
    size: int
    batch: int
    samples: int

    def build(self, run: Run) -> Ready:
        """Both networks at the start of the student's phase."""
        recipe = config.load(self.recipe, self.sets)
        splits, tasks = recipe.data.load(), recipe.scenario.tasks
        stream, form = Stream(splits, tasks, None, None, 0), recipe.student.input_spec()
        pixels = {"size": self.size, "channels": form.channels, "mean": form.mean, "std": form.std}
        spec = Spec(classes=len(stream.classes), tasks=tasks, channels=form.channels, size=self.size)
        pair = Pair(recipe, run, spec, _example(form.channels, self.size))
        for number in range(TASK + 1):
            for who, net in pair.nets().items():
                net.start_task(number, run.generator(who, "task", number))
        if pair.teacher is not None:
            pair.teach(False)
        return Ready(self, recipe, pair, stream, pixels)


@dataclass(frozen=True)
class Ready:
    """What ``Setting.build`` gives."""

    setting: Setting
    recipe: Any
    pair: Pair
    stream: Stream
    pixels: dict[str, Any]

    @property
    def window(self) -> tuple[int, int]:
        """The task's classes."""
        task = self.stream.task(TASK)
        return task.start, task.stop

    def batches(self, views: Views | None = None) -> Batches:
        """The task's training batches."""
        index = self.stream.task(TASK).train_index[: self.setting.samples]
        return Batches(
            self.recipe.data.load().train, index, self.stream.train_labels, views,
            batch_size=self.setting.batch, drop_last=True, **self.pixels,
        )  # fmt: skip

    def given(self) -> list[Batch]:
        """The task's training batches in memory, with the query that selects prompts."""
        return [self.pair.with_query(batch) for batch in self.batches().epoch(0)]

    def shape(self) -> dict[str, Any]:
        """What is said beside the figures."""
        nets = {who: f"{net.width} x {len(net.backbone.blocks)}" for who, net in self.pair.nets().items()}
        return {"pair": self.setting.recipe, "image": self.setting.size, "batch": self.setting.batch} | nets


class Timed:
    """A source that notes when it is asked for each batch.

    Attributes:
        laps: seconds from one request to the next: what a step costs, with all that goes on around it.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.steps = source, source.steps
        self.laps: list[float] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of the source."""
        began = perf_counter()
        for batch in self.source.epoch(epoch, start):
            yield batch
            now = perf_counter()
            self.laps.append(now - began)
            began = now


class Given:
    """Batches that lie ready in memory: the same in each epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.steps = batches, len(batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches."""
        return iter(self.batches[start:])


def _example(channels: int, size: int) -> Batch:
    zeros = torch.zeros(2, dtype=torch.int64)
    return Batch(inputs=torch.rand(2, channels, size, size), labels=zeros, index=zeros, view=zeros)
