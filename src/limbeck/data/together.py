"""Two sources whose batches are joined: labelled and unlabelled samples in every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from limbeck.contracts import Batch
from limbeck.data.batches import Batches


class Sampled(Protocol):
    """Batches over samples that have a place and a label.

    Attributes:
        index: positions [n] of the samples.
        batch_size: samples of a batch.
        seed: fixes their order.
        labels: labels [N] of the whole data.
        noisy: True [N] where the label is known to be wrong; None = not known.
    """

    index: Tensor
    batch_size: int
    seed: int

    @property
    def labels(self) -> Tensor: ...

    @property
    def noisy(self) -> Tensor | None: ...

    def in_order(self, batch_size: int) -> Self: ...

    @property
    def steps(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...

    def subset(self, index: Tensor) -> Self: ...


class Going:
    """Batches that go round and round: ``steps`` to an epoch, whatever number they have themselves.

    Args:
        batches: gone over again and again, each round in an order of its own.
        steps: of an epoch.
    """

    def __init__(self, batches: Sampled, steps: int) -> None:
        self.batches, self.steps = batches, steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        step, stop = epoch * self.steps + start, (epoch + 1) * self.steps
        while step < stop:
            number, first = divmod(step, self.batches.steps)
            for batch in self.batches.epoch(number, first):
                yield batch
                step += 1
                if step == stop:
                    return


class Together:
    """Each step has a batch of either source; an epoch goes once over ``rest``, and ``first`` goes round.

    Source: the loop over the unlabelled loader of DHO (arXiv 2505.07675).
    """

    def __init__(self, first: Batches, rest: Batches) -> None:
        self.first, self.rest, self.steps = Going(first, rest.steps), rest, rest.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        for one, other in zip(self.first.epoch(epoch, start), self.rest.epoch(epoch, start), strict=True):
            yield joined(one, other)


def joined(one: Batch, other: Batch) -> Batch:
    """Both batches as one."""
    parts: dict[str, Any] = {f.name: (getattr(one, f.name), getattr(other, f.name)) for f in fields(one)}
    there: dict[str, Any] = {k: torch.cat(pair) for k, pair in parts.items() if isinstance(pair[0], Tensor)}
    return replace(one, **there)
