"""Texts that a student wrote and learns from again, as many as its validation loss asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch
from limbeck.data.tokens import batch_of
from limbeck.losses.on_policy import adaptive_share
from limbeck.scenarios.written import Texts, Writing, Written


class Memory(nn.Module):
    """The newest texts that a student wrote, in buffers, so that a checkpoint has them.

    Attributes:
        texts: [capacity, T].
        origin: the row of the data [capacity] that each is of.
        count: how many there were.
    """

    origin: Tensor
    count: Tensor

    def __init__(self, capacity: int, length: int) -> None:
        super().__init__()
        self.texts = Texts(capacity, length)
        self.register_buffer("origin", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("count", torch.tensor(0))

    @property
    def full(self) -> bool:
        """Whether each new text takes the place of the oldest."""
        return int(self.count) >= len(self.origin)

    def add(self, texts: Texts, index: Tensor) -> None:
        """Keep the first texts of ``texts``, of the rows ``index`` [N] of the data."""
        places = (int(self.count) + torch.arange(len(index))) % len(self.origin)
        for own, new in zip(self.texts.buffers(), texts.buffers(), strict=True):
            own[places] = new[: len(index)]
        self.origin[places] = index.to(self.origin)
        self.count += len(index)

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Places [count] of different texts, by chance."""
        return torch.randperm(min(int(self.count), len(self.origin)), generator=generator)[:count]


class Replayed(Written):
    """Batches of which some are written, and some were before: see ``Buffer``.

    Args:
        plan: what is written, with a buffer.
        given: as ``Written``.
        epochs: of the training.
        validate: gives the student's loss on the texts held out.

    Attributes:
        told: epoch whose share was logged last.
        memory: what is learnt from again.
    """

    told: Tensor

    def __init__(
        self, plan: Writing, *given: Any, epochs: int, validate: Callable[[], float], **named: Any
    ) -> None:
        super().__init__(plan, *given, **named)
        assert plan.buffer is not None
        self.epochs, self.validate, self.buffer = epochs, validate, plan.buffer
        self.memory = Memory(self.buffer.capacity, self.texts.length)
        self.register_buffer("told", torch.tensor(-1))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        losses = self.losses(epoch)
        share = self.share(losses)
        if int(self.told) < epoch:
            self.told.fill_(epoch)
            self.run.log("writing", epoch=epoch, validation=losses[-1], share=share)
        for step, batch in enumerate(self.source.epoch(epoch, start), start):
            draw, left = self.draw(epoch, step), 1 - (epoch * self.steps + step) / (self.epochs * self.steps)
            fresh = share * left if self.memory.full else share
            if draw < fresh or self.begun.tolist() == [epoch, step]:  # written before the step failed
                yield self.written(batch, epoch, step)
            else:
                yield self.again(batch, epoch, step) if draw < share else batch

    def losses(self, epoch: int) -> list[float]:
        """The losses at the beginning of the epochs up to ``epoch``."""
        return [self.run.once(f"writing-{each}", self.validate) for each in range(epoch + 1)]

    def share(self, losses: list[float]) -> float:
        """The chance, behind these losses, that a batch is a text of the network's."""
        rise, tolerance = self.buffer.rise, self.buffer.tolerance
        return adaptive_share(losses, self.plan.share, rise=rise, tolerance=tolerance)

    def written(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``batch`` with its prompts continued, and kept."""
        known = self.begun.tolist() == [epoch, step]
        found = super().written(batch, epoch, step)
        if not known:
            self.memory.add(self.texts, batch.index)
        return found

    def again(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Texts of the buffer in the place of ``batch``."""
        places = self.memory.drawn(len(batch.index), self.run.generator("replayed", epoch, step))
        origin = self.memory.origin[places].cpu()
        rows = self.memory.texts.rows(self.rows, origin, places)
        return replace(batch_of(rows, torch.arange(len(places))), index=origin, view=batch.view)

    def facts(self) -> dict[str, Any]:
        """What ``result.json`` says: loss and share by epoch, how many texts were written."""
        losses = self.losses(self.epochs - 1)
        shares = [self.share(losses[: number + 1]) for number in range(self.epochs)]
        return {"validation": losses, "share": shares, "written": int(self.memory.count)}
