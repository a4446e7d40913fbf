"""Texts that a network writes itself, in place of those of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf, log
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Spec
from limbeck.data import chance
from limbeck.data.tokens import UNCOUNTED, Rows, batch_of
from limbeck.engine.fit import Source
from limbeck.engine.run import Run
from limbeck.engine.state import read_sealed, write_sealed
from limbeck.errors import ConfigError
from limbeck.losses.on_policy import DRAWN
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.generation import Sampling, drawn

MOST = 1_000_000  # texts of a buffer
_SHARE = 307  # purpose of the draw whether a batch is written
Told = Sequence[tuple[int, float]]  # tokens, each with the probability that it was drawn with


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A student's texts that are learnt from again; how often it learns from its own follows how it does.

    At each epoch's beginning φ, which starts as ``Writing.share``, rises where the loss on the texts held out
    has risen. At step t of T a batch is then written with the chance φ (1 - t / T), or as long as the buffer
    is not full with the chance φ; else, with what is left of φ, it is drawn from the buffer.

    Attributes:
        capacity: texts that are kept, the newest; at most a million.
        rise: what is added to φ, up to 1.
        tolerance: ε, nats by which the loss must have risen (``adaptive_share``).

    Raises:
        ConfigError: a field out of its range.

    Source: Ko et al. (DistiLLM), ICML 2024 (arXiv 2402.03898), section 3.2 and official code.
    """

    capacity: int = 1000
    rise: float = 0.1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.capacity <= MOST:
            raise ConfigError(f"capacity is {self.capacity}: allowed are values from 1 to {MOST}")
        for name in ("rise", "tolerance"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise ConfigError(f"{name} is {value}: allowed are finite values of at least 0")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What part of the texts a network writes, and how.

    Attributes:
        share: chance λ in [0, 1] that a batch is written, drawn for each batch.
        by: ``student``, with the weights that it then has, or ``teacher``. A student that holds several
            networks writes as the whole of them.
        lag: steps for which texts are written at once: the last of them are learnt from ``lag - 1`` steps
            after the student wrote them.
        replays: K different texts for each prompt, in turn, as a teacher writes them; None = a new one each
            time.
        prompt: tokens at the beginning of a row that are kept, where the texts have no prompts; fewer where
            its first document has fewer.
        temperature: of the draws; 0 = the most probable token.
        top_k: draw among so many tokens; 0 = all.
        top_p: draw among the most probable tokens that hold this mass; 1 = all.
        teacher_mix: share α in [0, 1) of the teacher in the law that a student draws from, so that it does
            not learn to please by texts that no one writes; MiniLLM has 0.2.
        buffer: keeps a student's texts and lets its share rise, which DistiLLM begins at 0; None = each text
            is learnt from once, and ``share`` stays.

    Raises:
        ConfigError: a field out of its range, or a student's texts that are to be kept.

    Source: λ: Agarwal et al. (GKD), ICLR 2024 (arXiv 2306.13649), algorithm 1. The kept texts of a teacher
    with the labels alone are sequence-level KD: Kim and Rush, EMNLP 2016 (arXiv 1606.07947). α: Gu et al.
    (MiniLLM), ICLR 2024 (arXiv 2306.08543), section 2.2.
    """

    share: float = 0.5
    by: Literal["student", "teacher"] = "student"
    lag: int = 1
    replays: int | None = None
    prompt: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    teacher_mix: float = 0.0
    buffer: Buffer | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}: allowed are chances from 0 to 1")
        for name in ("lag", "replays", "prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1")
        if self.replays is not None and self.by == "student":
            raise ConfigError("replays keeps a teacher's texts, but by is student: set replays to null")
        if not 0 <= self.teacher_mix < 1:
            raise ConfigError(f"teacher_mix is {self.teacher_mix}: allowed are shares from 0, below 1")
        if self.teacher_mix and self.by == "teacher":
            raise ConfigError("teacher_mix is of a student's texts, but by is teacher: set teacher_mix to 0")
        if self.buffer is not None and (self.by == "teacher" or self.lag > 1):
            raise ConfigError(
                "buffer keeps a student's texts as they are written: set by to student and lag to 1, or "
                "buffer to null"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def model_of(net: nn.Module) -> Any:
    """The causal language model of transformers within a network."""
    (found,) = [part.network for part in net.modules() if isinstance(part, CausalLM)]
    return found


def writes(net: nn.Module) -> bool:
    """Whether a network holds such a model; a served one holds none."""
    return any(isinstance(part, CausalLM) for part in net.modules())


def check_prompts(prompt: int, rows: Rows) -> None:
    """Raise ``ConfigError`` where ``rows`` have no beginnings of ``prompt`` tokens that can be continued."""
    length = rows.ids.shape[1]
    if prompt >= length:
        raise ConfigError(f"prompt is {prompt} but rows have {length} tokens: keep fewer")
    if rows.prompts and rows.segments is not None:
        raise ConfigError(
            "data.pack puts several prompts into a row, of which one is continued: set it to false"
        )


class Texts(nn.Module):
    """Rows of tokens that a network wrote, in buffers, so that a checkpoint has them.

    Attributes:
        ids: what is read [N, T].
        following: what is to be said [N, T]: the written tokens, ``UNCOUNTED`` elsewhere.
        drawn: the log-probability [N, T] that each of them was drawn with.
    """

    ids: Tensor
    following: Tensor
    drawn: Tensor

    def __init__(self, count: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("ids", torch.zeros((count, length), dtype=torch.int64))
        self.register_buffer("following", torch.full((count, length), UNCOUNTED))
        self.register_buffer("drawn", torch.zeros(count, length))

    def clear(self) -> None:
        """Forget all."""
        self.ids.zero_()
        self.following.fill_(UNCOUNTED)
        self.drawn.zero_()

    def put(self, row: int, prompt: Sequence[int], told: Told) -> None:
        """Let ``row`` be a prompt with what was written behind it, as far as there is room."""
        text = torch.tensor([*prompt, *(token for token, _ in told)])[: self.length + 1]
        place = slice(len(prompt) - 1, len(text) - 1)
        self.ids[row, : len(text) - 1] = text[:-1]
        self.following[row, place] = text[len(prompt) :]
        chances = [log(chance) if chance > 0 else -torch.inf for _, chance in told]
        self.drawn[row, place] = torch.tensor(chances[: len(text) - len(prompt)])

    def rows(self, prompts: Rows, index: Tensor, part: slice | Tensor = slice(None)) -> Rows:
        """The texts of ``part`` as rows; their prompts are from the rows ``index`` of ``prompts``."""
        return Rows(
            name=prompts.name, ids=self.ids[part].cpu(), following=self.following[part].cpu(), segments=None,
            domain=prompts.domain[index], domains=prompts.domains, marks={DRAWN: self.drawn[part].cpu()},
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A network that continues the beginnings of rows.

    Attributes:
        model: the network.
        length: T, tokens of a row.
        prompt: tokens at the beginning of a row that are kept, where it has no prompt.
        eos: the token that ends a text; None = there is none.
        batch_size: texts that are written together.
        vocabulary: how many tokens there are, of which a model may have room for more.
        sampling: how tokens are drawn.
        other: a second network and its share in what is drawn from; None = there is none.
    """

    model: Any
    length: int
    prompt: int
    eos: int | None
    batch_size: int
    vocabulary: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    other: tuple[Any, float] | None = None

    def prompt_of(self, rows: Rows, row: int) -> list[int]:
        """What is kept of a row: the prompt, or the first tokens of its first document."""
        counts = rows.following[row] != UNCOUNTED
        if rows.segments is not None:
            counts &= rows.segments[row] == rows.segments[row, 0]
        places = counts.nonzero().flatten().tolist()
        kept = places[0] + 1 if places[0] else min(self.prompt, places[-1] + 1)
        found: list[int] = rows.ids[row, : min(kept, self.length - 1)].tolist()
        return found

    def continued(
        self, prompts: Sequence[Sequence[int]], generator: torch.Generator, keys: Sequence[int]
    ) -> list[Told]:
        """What the network writes behind each prompt; a ``key`` stands for the draws of one text."""
        found: list[Told] = [[] for _ in prompts]
        by_room: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_room.setdefault(self.length + 1 - len(prompt), []).append(place)
        root = generator.get_state()
        for room, places in by_room.items():
            generator.set_state(root)
            told = drawn(
                self.model, [prompts[place] for place in places], max_new_tokens=room,
                eos=() if self.eos is None else (self.eos,), sampling=self.sampling, generator=generator,
                keys=[keys[place] for place in places], batch_size=self.batch_size, other=self.other,
                vocabulary=self.vocabulary,
            )  # fmt: skip
            for place, text in zip(places, told, strict=True):
                found[place] = text
        return found

    def write(self, texts: Texts, rows: Rows, index: Tensor, generator: torch.Generator) -> None:
        """Fill ``texts`` with continuations of the rows ``index`` [N]."""
        prompts = [self.prompt_of(rows, int(row)) for row in index]
        told = self.continued(prompts, generator, range(len(prompts)))
        for row, (prompt, text) in enumerate(zip(prompts, told, strict=True)):
            texts.put(row, prompt, text)


class Written(nn.Module):
    """Batches of which some are written when they are asked for.

    What was written ahead is held in buffers, and texts that come again in files of the run, as they are
    written: a resumed run learns from the same texts. Each token that was written carries the mark ``DRAWN``.

    Args:
        plan: what is written.
        source: the data's batches: their prompts are kept.
        rows: what these are batches of.
        model: the network that writes.
        run: gives the draws.
        spec: how many tokens there are, and which one ends a text.
        batch_size: rows of a batch.
        teacher: the network that ``plan.teacher_mix`` is the share of.

    Attributes:
        texts: [lag * batch, T], written at once.
        begun: epoch and step that they were written for.

    Raises:
        CheckpointError: a file of texts that come again is damaged.
    """

    begun: Tensor

    def __init__(
        self, plan: Writing, source: Source, rows: Rows, model: Any, run: Run, *, spec: Spec,
        batch_size: int, teacher: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        length = rows.ids.shape[1]
        self.plan, self.source, self.rows, self.run, self.batch_size = plan, source, rows, run, batch_size
        other = (teacher, plan.teacher_mix) if plan.teacher_mix else None
        self.writer = Writer(
            model=model, length=length, prompt=plan.prompt, eos=spec.special.get("eos"),
            batch_size=plan.lag * batch_size, vocabulary=spec.classes, sampling=plan.sampling(), other=other,
        )  # fmt: skip
        # Written again beside other prompts, a text might differ in a last bit, and then in a token.
        self.kept: dict[tuple[int, int], Told] = {}
        for path in sorted(self._folder.glob("*.json")):
            self._take(read_sealed(path))
        self.texts = Texts(plan.lag * batch_size, length)
        self.register_buffer("begun", torch.full((2,), -1))

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.source.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        for step, batch in enumerate(self.source.epoch(epoch, start), start):
            yield self.written(batch, epoch, step) if self.draw(epoch, step) < self.plan.share else batch

    def draw(self, epoch: int, step: int) -> float:
        """What decides in [0, 1) whether the batch of a step is written."""
        return float(chance.bits(self.run.seed, _SHARE, epoch, step)[0] / 2**64)

    def written(self, batch: Batch, epoch: int, step: int) -> Batch:
        """``batch`` with its prompts continued."""
        first = step - step % self.plan.lag
        if self.begun.tolist() != [epoch, first]:
            self._write(epoch, first)
        at = (step - first) * self.batch_size
        count = len(batch.index)
        rows = self.texts.rows(self.rows, batch.index, slice(at, at + count))
        return replace(batch_of(rows, torch.arange(count)), index=batch.index, view=batch.view)

    def _write(self, epoch: int, first: int) -> None:
        """Write the texts of the steps ``first`` .. ``first + lag - 1`` with the weights of now."""
        self.texts.clear()
        batches = islice(self.source.epoch(epoch, first), self.plan.lag)
        rows = {
            place * self.batch_size + number: int(row)
            for place, batch in enumerate(batches)
            for number, row in enumerate(batch.index)
        }
        prompts = {row: self.writer.prompt_of(self.rows, row) for row in rows.values()}
        told = self._continued(rows, prompts, epoch, first)
        for place, row in rows.items():
            self.texts.put(place, prompts[row], told[place])
        self.begun.copy_(torch.tensor([epoch, first]))

    def _continued(
        self, rows: dict[int, int], prompts: dict[int, list[int]], epoch: int, first: int
    ) -> dict[int, Told]:
        """What the network writes at each place behind the prompt of its row."""
        if self.plan.replays is None:
            draws = self.run.generator("written", epoch, first)
            found = self.writer.continued([prompts[row] for row in rows.values()], draws, list(rows))
            return dict(zip(rows, found, strict=True))
        turn = epoch % self.plan.replays
        new = [row for row in prompts if (row, turn) not in self.kept]
        if new:
            draws = self.run.generator("written", turn)
            texts = self.writer.continued([prompts[row] for row in new], draws, new)
            told = {"turn": turn, "rows": new, "texts": texts}
            if self.run.ranks.first:
                write_sealed(self._folder / f"{epoch:06d}-{first:09d}.json", told)
            self._take(told)
        return {place: self.kept[row, turn] for place, row in rows.items()}

    @property
    def _folder(self) -> Path:
        return self.run.folder / "checkpoints" / "written"

    def _take(self, told: dict[str, Any]) -> None:
        pairs = zip(told["rows"], told["texts"], strict=True)
        self.kept |= {(row, told["turn"]): text for row, text in pairs}
