"""A run in miniature: some steps of each stage, from which follows what the whole run will cost.

The scenario is carried out as it is, in a folder of its own: it asks its run for the steps of a stage, for
passes over data and for captures, and this one gives it the beginning of each. What is not cut short, such as
reading data, building networks or writing a text, is done in full and counts as it was seen.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Progress
from limbeck.engine.capture import Captured
from limbeck.engine.run import Position, Run
from limbeck.engine.settings import Engine

if TYPE_CHECKING:
    from limbeck.engine.fit import Source, Turn

LEAST, FIRST_SECONDS, LATER_SECONDS = 3, 3.0, 0.5
"""A stage is probed for so many steps at least, and for so long; less long behind others of its kind."""
WHOLE = 3
"""So many batches of a pass are taken; of later ones of its kind one, with so many images:"""
FEW = 8


@dataclass(frozen=True)
class Part:
    """Something that the run does many times, as far as it was probed.

    Attributes:
        name: of the stage, the pass or the network that is captured.
        count: how often the run does it.
        seen: how often the probe did.
        each: seconds of one.
        ahead: seconds that the run needs besides those that the probe took.
        bytes: that it leaves in a cache.
        shared: whether that cache is one that later runs share.
        there: whether an earlier run has done it.
    """

    name: str
    count: int
    seen: int
    each: float
    ahead: float
    bytes: int = 0
    shared: bool = False
    there: bool = False

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.each * self.count


class Probe(Run):
    """A run that does the beginning of each stage and remembers what is left out.

    Attributes:
        stages: what ``fit`` was asked for.
        passes: passes over data without training.
        captures: what frozen networks are asked once.
        checkpoint: bytes of the largest checkpoint, and seconds that it took.
        learning: parameters that some stage trains, by identity.
        paces: seconds of one step, batch or row, by its kind.
        sampled: rows of captures, by what was asked.
        places: the captures' folders.
        vain: seconds spent on what the real run does not do.
    """

    probing = True

    def __init__(self, folder: Path, settings: Engine, seed: int) -> None:
        super().__init__(folder, settings, seed, quiet=True)
        self.stages: list[Part] = []
        self.passes: list[Part] = []
        self.captures: list[Part] = []
        self.checkpoint = (0, 0.0)
        self.learning: dict[int, Tensor] = {}
        self.vain = 0.0
        self._aside = 0.0
        self.paces: dict[str, float] = {}
        self.sampled: dict[str, dict[str, Tensor]] = {}
        self.places: set[Path] = set()

    def clock(self) -> float:
        """Seconds, without those that belong to something within a step."""
        return time.perf_counter() - self._aside

    @contextmanager
    def apart(self, *, vain: bool = False) -> Iterator[None]:
        """Within the context, time is no step's; ``vain``: nor the run's."""
        began = self.clock()
        yield
        spent = self.clock() - began
        self._aside += spent
        self.vain += spent if vain else 0.0

    def enter(self, stage: str, turns: Sequence[Turn]) -> Position | None:
        """As of a run; and what learns."""
        self.learning |= {id(p): p for turn in turns for p in turn.parameters}
        return super().enter(stage, turns)

    def adopt(self, stage: str) -> None:
        """As of a run; and that there is nothing to do."""
        self.stages.append(Part(stage, 0, 0, 0.0, 0.0, there=True))
        super().adopt(stage)

    def _show_once(self, warning: str) -> None:
        """A warning is the run's to show."""

    def save(self, stage: str, turns: Sequence[Turn], epoch: int, batch: int, step: int) -> None:
        """As of a run; and how large and slow a checkpoint is."""
        began = time.perf_counter()
        super().save(stage, turns, epoch, batch, step)
        newest = self.folder / "checkpoints" / f"{self._numbers()[-1]:06d}"
        size = sum(newest.with_suffix(end).stat().st_size for end in (".json", ".safetensors"))
        self.checkpoint = max(self.checkpoint, (size, time.perf_counter() - began))

    def steps(self, source: Source, epochs: int, start: Position) -> Iterator[tuple[int, int, Batch]]:
        """The first steps of a stage."""
        total, times, kind = source.steps * epochs, list[float](), self.stage.rpartition("/")[2]
        limit = LATER_SECONDS if "/" in self.stage and kind in self.paces else FIRST_SECONDS
        began, last = self.clock(), self.clock()
        for each in super().steps(source, epochs, start):
            yield each
            times.append(self.clock() - last)
            last = self.clock()
            if len(times) >= LEAST and last - began > limit:
                break
        measured = [self.diagnoses(Progress(step=step, steps=total)) for step in range(total)]
        plain = [t for t, slow in list(zip(times, measured, strict=False))[1:] if not slow] or times[-1:]
        slow = [t for t, slow in zip(times, measured, strict=False) if slow]
        pace = fmean(plain) if plain else 0.0
        if len(plain) < LEAST:
            pace = self.paces.get(kind, pace)
        self.paces.setdefault(kind, pace)
        left = measured[len(times) :]
        ahead = pace * left.count(False) + (fmean(slow) if slow else pace) * left.count(True)
        whole = sum(times) + ahead
        self.stages.append(Part(self.stage, total, len(times), whole / max(total, 1), ahead))

    def over(self, name: str, source: Source) -> Iterator[Batch]:
        """The first batches of a pass; a short one in full."""
        total, times = source.steps, list[float]()
        known = name in self.paces
        with self.apart():
            last = self.clock()
            for batch in islice(super().over(name, source), 1 if known else WHOLE):
                yield few(batch) if known else batch
                times.append(self.clock() - last)
                last = self.clock()
        pace = self.paces.setdefault(name, fmean(times[1:] or times))
        ahead = pace * total - sum(times) if known else pace * (total - len(times))
        self.passes.append(Part(name, total, len(times), (sum(times) + ahead) / total, ahead))

    def kept(self, captured: Captured) -> Captured:
        """What answers in the place of a capture, from some of its rows."""
        return Sampled(captured, self)

    def memory(self) -> int:
        """The largest resident memory of this process so far, and what caches will hold besides, in bytes."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        shared = sum(part.bytes for part in self.captures if part.shared)
        own = max((part.bytes for part in self.captures if not part.shared), default=0)
        return most + shared + own

    def seconds_ahead(self) -> float:
        """What the run needs besides the time that the probe took; less where the probe did more."""
        parts = [*self.stages, *self.passes, *self.captures]
        left = sum(part.ahead for part in parts) - self.vain
        every = self.settings.checkpoint_seconds
        stepping = sum(part.seconds for part in self.stages)
        return left + self.checkpoint[1] * (math.floor(stepping / every) if every else 0)


def few(batch: Batch) -> Batch:
    """The first images of a batch; a batch of texts as it is."""
    if batch.rows is not None:
        return batch
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    cut: dict[str, Any] = {name: x[:FEW] for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(batch, **cut)


class Sampled(Captured):
    """A capture of which some rows stand for all.

    Args:
        captured: what the run would fill.
        probe: the probe.
    """

    def __init__(self, captured: Captured, probe: Probe) -> None:
        self.__dict__.update(captured.__dict__)
        self.probe, self.rows = probe, dict[str, Tensor]()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Rows of the right shapes; of texts, whose rows belong to their tokens, the right ones."""
        if not self.rows:
            with self.probe.apart():
                self.rows = self._look()
        if batch.rows is not None:
            with self.probe.apart(vain=True):
                return self._said(batch)
        place = batch.index.cpu()
        return {name: rows[place % len(rows)].to(batch.inputs.device) for name, rows in self.rows.items()}

    def delete(self) -> None:
        """There is nothing to remove."""

    @torch.no_grad()
    def _said(self, batch: Batch) -> dict[str, Tensor]:
        rows = self.ask(batch.to(self.device))
        return {name: row.float() if row.is_floating_point() else row for name, row in rows.items()}

    def _look(self) -> dict[str, Tensor]:
        """Ask about some samples, unless others were asked about that stand for these, too."""
        probe, cache, asked, spent = self.probe, self.place(), 0, 0.0
        name = str(cache.key["what"])
        if name not in probe.sampled:
            for batch in islice(self.batches.in_order(self.size).epoch(0), 2):
                began = time.perf_counter()
                probe.sampled[name] = self._said(batch)
                took = time.perf_counter() - began
                asked, spent = asked + len(batch.index), spent + took
                probe.paces[name] = took / len(batch.index)
        rows, pace = probe.sampled[name], probe.paces[name]
        if cache.folder in probe.places:  # filled for another use
            return rows
        probe.places.add(cache.folder)
        if cache.complete:
            probe.vain += spent
        ahead = 0.0 if cache.complete else pace * (cache.count - asked)
        size = cache.count * sum(self._bytes(row) for row in rows.values())
        shared = probe.folder not in cache.folder.parents
        probe.captures.append(
            Part(name, cache.count, asked, pace, ahead, bytes=size, shared=shared, there=cache.complete)
        )
        return rows

    def _bytes(self, rows: Tensor) -> int:
        """Of one sample on disk."""
        kind = self.dtype if rows.is_floating_point() else rows.dtype
        return rows[0].numel() * kind.itemsize
