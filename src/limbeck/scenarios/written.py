"""Texts that a network writes itself, in place of those of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch
from limbeck.data import chance
from limbeck.data.tokens import UNCOUNTED, Rows, batch_of
from limbeck.engine.fit import Source
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.nets.generation import Sampling, generate

_SHARE = 307  # purpose of the draw whether a batch is written


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What part of the texts a network writes, and how.

    Attributes:
        share: chance λ in [0, 1] that a batch is written, drawn for each batch.
        by: ``student``, with the weights that it then has, or ``teacher``.
        lag: steps for which texts are written at once: the last of them are learnt from ``lag - 1`` steps
            after the student wrote them.
        replays: K different texts for each prompt, in turn, as a teacher writes them; None = a new one each
            time.
        prompt: tokens at the beginning of a row that are kept, where the texts have no prompts.
        temperature: of the draws; 0 = the most probable token.
        top_k: draw among so many tokens; 0 = all.
        top_p: draw among the most probable tokens that hold this mass; 1 = all.

    Raises:
        ConfigError: a field out of its range, or a student's texts that are to be kept.

    Source: λ: Agarwal et al. (GKD), ICLR 2024 (arXiv 2306.13649), algorithm 1. The kept texts of a teacher
    with the labels alone are sequence-level KD: Kim and Rush, EMNLP 2016 (arXiv 1606.07947).
    """

    share: float = 0.5
    by: Literal["student", "teacher"] = "student"
    lag: int = 1
    replays: int | None = None
    prompt: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}: allowed are chances from 0 to 1")
        for name in ("lag", "replays", "prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1")
        if self.replays is not None and self.by == "student":
            raise ConfigError("replays keeps a teacher's texts, but by is student: set replays to null")
        self.sampling()

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Written(nn.Module):
    """Batches of which some are written when they are asked for.

    What was written ahead is held in buffers: a resumed run learns from the same texts.

    Args:
        plan: what is written.
        source: the data's batches: their prompts are kept.
        rows: what these are batches of.
        model: the network that writes.
        run: gives the draws.
        eos: the token that ends a text; None = there is none.

    Attributes:
        ids: texts [lag * batch, T] that were written at once.
        following: their next tokens, or ``UNCOUNTED``.
        begun: epoch and step that they were written for.
    """

    ids: Tensor
    following: Tensor
    begun: Tensor

    def __init__(
        self, plan: Writing, source: Source, rows: Rows, model: Any, run: Run, *, eos: int | None,
        batch_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.plan, self.source, self.rows, self.run, self.eos = plan, source, rows, run, eos
        self.model = (model,)  # unregistered: it is the scenario's
        self.batch_size, self.length = batch_size, rows.ids.shape[1]
        if plan.prompt >= self.length:
            raise ConfigError(f"prompt is {plan.prompt} but rows have {self.length} tokens: keep fewer")
        if rows.prompts and rows.segments is not None:
            raise ConfigError(
                "data.pack puts several prompts into a row, of which one is continued: set it to false"
            )
        self.kept: dict[tuple[int, int], list[int]] = {}  # a frozen teacher's: they can be written again
        shape = (plan.lag * batch_size, self.length)
        self.register_buffer("ids", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("following", torch.full(shape, UNCOUNTED))
        self.register_buffer("begun", torch.full((2,), -1))

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.source.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        for step, batch in enumerate(self.source.epoch(epoch, start), start):
            draw = chance.bits(self.run.seed, _SHARE, epoch, step)[0] / 2**64
            yield self.written(batch, epoch, step) if draw < self.plan.share else batch

    def written(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``batch`` with its prompts continued."""
        first = step - step % self.plan.lag
        if self.begun.tolist() != [epoch, first]:
            self._write(epoch, first)
        at = (step - first) * self.batch_size
        part = slice(at, at + len(batch.index))
        rows = Rows(
            name=self.rows.name, ids=self.ids[part].cpu(), following=self.following[part].cpu(),
            segments=None, domain=self.rows.domain[batch.index], domains=self.rows.domains,
        )  # fmt: skip
        made = batch_of(rows, torch.arange(len(batch.index)))
        return Batch(
            inputs=made.inputs, labels=made.labels, index=batch.index, view=batch.view, rows=made.rows
        )

    def _write(self, epoch: int, first: int) -> None:
        """Write the texts of the steps ``first`` .. ``first + lag - 1`` with the weights of now."""
        self.ids.zero_()
        self.following.fill_(UNCOUNTED)
        for place, batch in enumerate(islice(self.source.epoch(epoch, first), self.plan.lag)):
            prompts = [self._prompt(int(row)) for row in batch.index]
            for number, (prompt, told) in enumerate(
                zip(prompts, self._continued(batch, prompts, epoch, first + place), strict=True)
            ):
                text = torch.tensor([*prompt, *told])[: self.length + 1]
                row = place * self.batch_size + number
                self.ids[row, : len(text) - 1] = text[:-1]
                self.following[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
        self.begun.copy_(torch.tensor([epoch, first]))

    def _prompt(self, row: int) -> list[int]:
        """What is kept of a row: the prompt, or its first tokens."""
        counted = int((self.rows.following[row] != UNCOUNTED).nonzero()[0])
        kept = counted + 1 if counted else self.plan.prompt
        return self.rows.ids[row, : min(kept, self.length - 1)].tolist()

    def _continued(self, batch: Batch, prompts: list[list[int]], epoch: int, step: int) -> list[list[int]]:
        """What the network writes behind each prompt."""
        if self.plan.replays is None:
            return self._generated(prompts, self.run.generator("written", epoch, step), None)
        names = [(int(row), epoch % self.plan.replays) for row in batch.index]
        new = [place for place, name in enumerate(names) if name not in self.kept]
        rounds = self.run.generator("written", epoch % self.plan.replays)
        told = self._generated([prompts[place] for place in new], rounds, [names[place][0] for place in new])
        self.kept |= {names[place]: text for place, text in zip(new, told, strict=True)}
        return [self.kept[name] for name in names]

    def _generated(
        self, prompts: list[list[int]], generator: torch.Generator, keys: list[int] | None
    ) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        by_room: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_room.setdefault(self.length + 1 - len(prompt), []).append(place)
        root = generator.get_state()
        for room, places in by_room.items():
            generator.set_state(root)
            told = generate(
                self.model[0], [prompts[place] for place in places], max_new_tokens=room,
                eos=() if self.eos is None else (self.eos,), sampling=self.plan.sampling(),
                generator=generator,
                keys=places if keys is None else [keys[place] for place in places],
                batch_size=self.batch_size,
            )  # fmt: skip
            for place, text in zip(places, told, strict=True):
                found[place] = text
        return found
