"""Class-incremental streams: which classes arrive when, and how they are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.data.images import Splits
from limbeck.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Attributes:
        number: position in the stream, from 0.
        start: first class id that it owns, in the stream's numbering (classes seen before it).
        stop: one past its last class id (classes seen up to and including it).
        train_index: positions [n] of its samples in the train split, int64.
        test_index: the same in the test split.
        classes: names of its classes.
    """

    number: int
    start: int
    stop: int
    train_index: Tensor
    test_index: Tensor
    classes: tuple[str, ...]


class Stream:
    """A data set cut into tasks by class, and its classes re-numbered in the order of arrival.

    Attributes:
        splits: the data.
        class_order: the data set's class id at each place of the stream's numbering.
        sizes: classes per task.
        edges: first class id of each task, and one past the last: tasks + 1 numbers.
        classes: class names in the stream's numbering.
        train_labels: int64 [N_train], in the stream's numbering.
        test_labels: int64 [N_test], in the stream's numbering.

    Only labels are read here; no image is.
    """

    def __init__(
        self,
        splits: Splits,
        tasks: int,
        class_order: Sequence[int] | Literal["natural"] | None = None,
        sizes: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Cut ``splits`` into ``tasks``.

        Args:
            splits: the data.
            tasks: how many tasks, 1 .. number of classes.
            class_order: the data set's class ids in order of arrival; "natural" = 0, 1, 2, ...; None = a
                permutation drawn from ``seed`` (``numpy.random.default_rng(seed).permutation``).
            sizes: classes per task; None = equal, the first tasks taking one more where it does not divide.
            seed: fixes the class order; not read where ``class_order`` is given.

        Raises:
            ConfigError: the order is no permutation; more tasks than classes; sizes that do not fit.
            DataError: a class without train or without test samples.
        """
        count = len(splits.train.classes)
        self.splits = splits
        self.sizes = _sizes(tasks, count, sizes)
        self.class_order = _order(count, class_order, seed)
        self.classes = tuple(splits.train.classes[c] for c in self.class_order)
        self.edges = [0, *np.cumsum(self.sizes).tolist()]
        place = torch.empty(count, dtype=torch.int64)
        place[torch.tensor(self.class_order)] = torch.arange(count)
        self.train_labels = place[splits.train.labels]
        self.test_labels = place[splits.test.labels]
        for task in self:
            for part, index in (("train", task.train_index), ("test", task.test_index)):
                if len(index) == 0:
                    raise DataError(
                        f"task {task.number} (classes {', '.join(task.classes)}) has no {part} samples in "
                        f"{splits.train.name}: use fewer tasks, other sizes, or data that holds these classes"
                    )

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Task]:
        return (self.task(number) for number in range(len(self)))

    def task(self, number: int) -> Task:
        """Task ``number``.

        Raises:
            IndexError: there is no such task.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"task {number} is not in 0..{len(self) - 1}")
        start, stop = self.edges[number], self.edges[number + 1]
        train, test = (
            torch.nonzero((labels >= start) & (labels < stop)).flatten()
            for labels in (self.train_labels, self.test_labels)
        )
        return Task(number, start, stop, train, test, self.classes[start:stop])

    def seen(self, number: int) -> Tensor:
        """Positions of the test samples of tasks 0 .. ``number``: int64, for one test pass over all."""
        return torch.nonzero(self.test_labels < self.edges[number + 1]).flatten()


def _sizes(tasks: int, count: int, sizes: Sequence[int] | None) -> list[int]:
    if not 1 <= tasks <= count:
        raise ConfigError(
            f"scenario.tasks is {tasks} but must lie in 1..{count}: the data has {count} classes"
        )
    if sizes is None:
        return [count // tasks + (place < count % tasks) for place in range(tasks)]
    if len(sizes) != tasks or sum(sizes) != count or min(sizes) < 1:
        raise ConfigError(
            f"scenario.sizes is {list(sizes)} but must be {tasks} numbers of at least 1 that sum to {count}, "
            "one per task"
        )
    return list(sizes)


def _order(count: int, class_order: Sequence[int] | str | None, seed: int) -> list[int]:
    if class_order is None:
        return [int(c) for c in np.random.default_rng(seed).permutation(count)]
    if class_order == "natural":
        return list(range(count))
    if isinstance(class_order, str) or sorted(class_order) != list(range(count)):
        raise ConfigError(
            f"scenario.class_order is {class_order!r} but must be 'natural', null, or each of "
            f"0..{count - 1} once"
        )
    return list(class_order)
