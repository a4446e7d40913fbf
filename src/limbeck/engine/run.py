"""A run's folder: log, checkpoints, and where the run stands.

A run is a program that is replayed: its scenario starts from the top each time, and every stage asks the
run whether it is already done. Randomness never flows from stage to stage (each derives its own from
the seed and its name), so a replay reaches the point of the last checkpoint without doing the work again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Progress
from limbeck.engine import ranks, seeds, shards
from limbeck.engine.meter import Meter
from limbeck.engine.settings import Engine
from limbeck.engine.state import (
    State,
    load_variable_state,
    read_sealed,
    read_state,
    reason,
    sweep,
    variable_state,
    write_sealed,
    write_state,
)
from limbeck.engine.tracking import Tracking
from limbeck.errors import CheckpointError, ConfigError, Interrupted

if TYPE_CHECKING:
    from limbeck.engine.capture import Captured
    from limbeck.engine.fit import Source, Turn

SMALL_SHARE = 0.01
SAVE, STOP = 1, 2  # what is agreed on behind a step


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stage stands: the next batch of the epoch, and steps taken."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


def claim(folder: Path) -> IO[bytes]:
    """The log of a run's folder, open and locked until it is closed or the process ends, however that ends;
    what a killed process left half written is swept away.

    Raises:
        ConfigError: another process is at work in the folder, or nothing can be written there.
    """
    path = folder / "metrics.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OSError("metrics.jsonl there is no plain file, remove it")
        log = path.open("a+b")
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder}: {reason(error)}; name another folder with --out"
        ) from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        log.close()
        raise ConfigError(
            f"{folder} is in use by another process: wait for it, or name another folder"
        ) from error
    sweep(folder)
    return log


def difference(one: Any, other: Any, path: str = "") -> str:
    """The first place where two pieces of plain data differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        odd = next(key for key in keys if one.get(key) != other.get(key))
        return difference(one.get(odd), other.get(odd), f"{path}.{odd}".lstrip("."))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        odd = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return difference(one[odd], other[odd], f"{path}.{odd}".lstrip("."))
    return f"{path} was {one!r} and is {other!r}"


class Run:
    """One run in one folder.

    Args:
        folder: where everything goes.
        settings: the engine's.
        seed: all randomness of the run comes from it.
        modules: everything that learns or changes: what a checkpoint holds. May be set later, before
            the first stage.
        resume: go on where the folder's last good checkpoint stands.
        changed: though what it began with was changed.

    Raises:
        ConfigError: another process is at work in the folder.

    Attributes:
        probing: whether stages are only begun, to see what they cost.
    """

    probing: ClassVar[bool] = False

    def __init__(
        self, folder: Path, settings: Engine, seed: int, *, resume: bool = False, changed: bool = False,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.settings, self.seed, self.changed = folder, settings, seed, changed
        self.ranks = ranks.here()
        self.device = self.ranks.device(settings.torch_device())
        if settings.compile and self.ranks.size > 1:
            raise ConfigError("engine.compile is true, which several ranks do not go with: set it to false")
        self.modules: nn.Module = nn.ModuleDict()
        self.meter = Meter(quiet=quiet, mute=not self.ranks.first)
        self.rate = 0.0
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}
        self.pending: State | None = None
        self.stop = threading.Event()
        self._number = 0
        self._saved = time.monotonic()
        self._began = time.monotonic()
        self._facts: dict[str, Any] = {}
        self._shown: set[str] = set()
        self._found: list[str] = []
        self.stage, self._earlier = "", 0.0
        self._teacher_seconds = self._teacher_before = self._spent_before = 0.0
        self.tracking = Tracking(folder, settings.track if self.ranks.first else (), self.meter.note)
        with self.ranks.in_turn():
            self._log, self._log_sum = self._open_log(), hashlib.sha256()
            try:
                if resume:
                    self._find_checkpoint()
                else:
                    self._forget()
                self._cut_log()
            except BaseException:
                self._let_go()
                raise

    # What a scenario asks of a run

    def generator(self, *names: object) -> torch.Generator:
        """A fresh generator for what is named: the same seed and names give the same numbers."""
        return seeds.generator(self.seed, *names)

    def derive(self, *names: object) -> int:
        """A 63-bit seed from the run's seed and ``names``."""
        return seeds.derive(self.seed, *names)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """``compute()``, plain data, kept in the folder: a resumed run takes what was computed before."""
        if name not in self._facts:
            if self.pending is not None:
                raise CheckpointError(f"{self.folder / 'checkpoints'} has lost {name!r}: start the run anew")
            self._facts[name] = self.ranks.told(compute())
            self._write_facts()
        return self._facts[name]

    def agree(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep what the run begins with, plain data; a resumed run must find the same again.

        Args:
            name: what it is, for the message.

        Raises:
            CheckpointError: it is another, and the run was not told to take that from now on.
        """
        plain = json.loads(json.dumps(value))
        began = self._facts.setdefault(name, plain)
        if began == plain:
            return
        text = f"{name} is not what the run began with ({difference(began, plain)})"
        if not self.changed:
            raise CheckpointError(
                f"{text}: put it back, or go on with what is there now: limbeck resume {self.folder} "
                "--changed, in Python changed=True"
            )
        self._facts[name] = plain
        self._write_facts()
        self._noted(text)

    def log(self, event: str, **values: Any) -> None:
        """Add a line to ``metrics.jsonl``; silent while a resumed run passes over what it has done."""
        if self.pending is not None:
            return
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        try:
            self._log.write(line)
            self._log.flush()
            self._log_sum.update(line)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder / 'metrics.jsonl'}: {reason(error)}") from error
        self.tracking.tell({"event": event, **values})

    def teacher_share(self) -> float:
        """Share of the teacher's answers in the time of all steps so far, in [0, 1]."""
        return min(self._teacher_seconds / max(self._spent_before, 1e-9), 1.0)

    def total_seconds(self) -> float:
        """Time of all attempts at the run, as far as their checkpoints tell."""
        return self._earlier + time.monotonic() - self._began

    def warn(self, text: str) -> None:
        """Log and show a warning."""
        self.log("warning", text=text)
        self._show_once(text)

    def over(self, name: str, source: Source) -> Iterator[Batch]:
        """The batches of a pass over data without training; ``name`` says what for."""
        yield from source.epoch(0)

    def kept(self, captured: Captured) -> Captured:
        """What a frozen network is asked once, as this run does it."""
        return captured

    # What ``fit`` asks of a run

    def enter(self, stage: str, turns: Sequence[Turn]) -> Position | None:
        """Where ``stage`` starts; None when there is nothing left to do in it."""
        self.stage, self._teacher_before = stage, 0.0
        if self.pending is not None:
            state = self.pending
            if state["stage"] != stage:
                if stage in state["done"]:
                    self.done.append(stage)
                    return None
                raise CheckpointError(
                    f"the checkpoint stands in stage {state['stage']!r} but the run asks for {stage!r}: "
                    "the recipe in the folder was changed"
                )
            self._restore(state, turns)
            if stage in state["done"]:
                return None
            return Position(state["epoch"], state["batch"], state["step"])
        torch.manual_seed(self.derive("torch", stage))
        self.seconds[stage] = 0.0
        return Position()

    def steps(self, source: Source, epochs: int, start: Position) -> Iterator[tuple[int, int, Batch]]:
        """The batches of a stage from ``start`` on, each with its epoch and its place there."""
        for epoch in range(start.epoch, epochs):
            first = start.batch if epoch == start.epoch else 0
            for place, batch in enumerate(source.epoch(epoch, first), first):
                yield epoch, place, batch

    def after_step(
        self, stage: str, turns: Sequence[Turn], at: Progress, terms: Mapping[str, Mapping[str, Tensor]],
        batch: int, seconds: float,
    ) -> None:  # fmt: skip
        """Log, show, save and stop, as it is time for."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.meter.step(stage, at, seconds)
        logs = (at.step + 1) % self.settings.log_every == 0 or at.step + 1 == at.steps
        if logs and self.ranks.first:
            self._log_step(stage, turns, at, terms)
        due = self.ranks.first and time.monotonic() - self._saved > self.settings.checkpoint_seconds
        asked = self.ranks.highest(STOP if self.stop.is_set() else SAVE if due else 0)
        if asked == STOP:
            self.stop.set()
        if asked:
            self.save(stage, turns, at.epoch, batch, at.step + 1)
        self.heed(f"in {stage} at step {at.step + 1}")

    def heed(self, where: str) -> None:
        """Raise ``Interrupted`` if the user asked to stop; what is needed to go on must be on disk."""
        if self.stop.is_set():
            raise Interrupted(f"stopped {where}; continue with: limbeck resume {self.folder}")

    def leave(self, stage: str, turns: Sequence[Turn]) -> None:
        """Mark ``stage`` done and save."""
        self.done.append(stage)
        self.save(stage, turns, 0, 0, 0)

    def adopt(self, stage: str) -> None:
        """Mark ``stage`` done without training: its outcome was loaded from elsewhere."""
        self.leave(stage, ())

    def save(self, stage: str, turns: Sequence[Turn], epoch: int, batch: int, step: int) -> None:
        """Write a checkpoint: ``batch`` is the next one of ``epoch``. The first rank does it for all.

        Raises:
            CheckpointError: it cannot be written; the one before it still stands.
        """
        gathers = self.settings.shard != "none"
        if not self.ranks.first and not gathers:
            return
        state: State = {
            "stage": stage, "done": list(self.done), "epoch": epoch, "batch": batch, "step": step,
            "modules": variable_state(self.modules),
            "optimizers": {turn.name: shards.whole(turn.optimizer.state_dict()) for turn in turns},
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": dict(self.seconds), "facts": json.dumps(self._facts),
            "elapsed": self.total_seconds(), "teacher": [self._teacher_seconds, self._spent_before],
            "log_bytes": self._log.tell(), "log_sha256": self._log_sum.hexdigest(),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        if not self.ranks.first:
            return
        self._number += 1
        write_state(self.folder / "checkpoints" / f"{self._number:06d}", state)
        self._saved = time.monotonic()
        for stale in self._numbers()[: -self.settings.keep_checkpoints]:
            for suffix in (".json", ".safetensors"):
                (self.folder / "checkpoints" / f"{stale:06d}{suffix}").unlink(missing_ok=True)

    def draw_apart(self, at: Progress) -> None:
        """Let the networks of this rank draw by themselves in a step, as dropout does; those of the first
        one draw as if it were alone."""
        if not self.ranks.first:
            torch.manual_seed(self.derive("torch", self.stage, self.ranks.number, at.step))

    def diagnoses(self, at: Progress) -> bool:
        """Whether the shares of the gradient are measured at this step (not under ``compile`` and
        ``shard``)."""
        every = self.settings.diagnose_every
        first = min(1, every - 1, at.steps - 1)
        whole = not self.settings.compile and self.settings.shard == "none"
        return every > 0 and at.step % every == first and whole

    def shares(self, turn: str, at: Progress, shares: dict[str, float]) -> None:
        """Log each term's share of the gradient; report those under 1 %."""
        self.log("gradient_share", stage=self.stage, turn=turn, task=at.task, step=at.step, shares=shares)
        small = [name for name, share in shares.items() if share < SMALL_SHARE]
        if len(shares) > 1 and small:
            text = f"under 1 % of the gradient: {', '.join(small)}"
            self.log("warning", text=f"{self.stage}, {turn}, step {at.step}: {text}")
            self._show_once(f"{self.stage}, {turn}: {text}")

    # Inside

    def _show_once(self, warning: str) -> None:
        if self.pending is None and warning not in self._shown:
            self._shown.add(warning)
            self.meter.note(f"warning: {warning}")

    def _log_step(
        self, stage: str, turns: Sequence[Turn], at: Progress, terms: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        flat = {
            name if len(terms) == 1 else f"{turn}/{name}": value
            for turn, named in terms.items() for name, value in named.items()
        }  # fmt: skip
        values = dict(zip(flat, torch.stack([v.float() for v in flat.values()]).tolist(), strict=True))
        teacher = sum(getattr(turn.module, "teacher_seconds", 0.0) for turn in turns)
        spent = sum(self.seconds.values())
        asked = teacher - self._teacher_before
        share = min(asked / max(spent - self._spent_before, 1e-9), 1.0)
        self._teacher_seconds += asked
        self._teacher_before, self._spent_before = teacher, spent
        self.meter.show(sum(values.values()), values, share)
        self.log(
            "step", stage=stage, task=at.task, epoch=at.epoch, step=at.step, loss=sum(values.values()),
            terms=values, lr=self.rate, seconds=round(spent, 4), teacher_share=round(share, 4),
        )  # fmt: skip

    @property
    def _facts_file(self) -> Path:
        return self.folder / "checkpoints" / "facts.json"

    def _noted(self, text: str) -> None:
        """Show what was found in the folder, and log it once the log is written again."""
        self._found.append(text)
        self.meter.note(f"warning: {text}")

    def _open_log(self) -> IO[bytes]:
        """The log; the first rank holds the folder for all, and writes alone."""
        return claim(self.folder) if self.ranks.first else Path(os.devnull).open("a+b")

    def _write_facts(self) -> None:
        if self.ranks.first:
            write_sealed(self._facts_file, self._facts)

    def _let_go(self) -> None:
        """Close the log and end its lock, which a data loader's workers, if they live on, would hold open."""
        with suppress(OSError):  # on a full disk, what could not be written was reported where it was written
            self._log.flush()
        with suppress(OSError):
            fcntl.flock(self._log, fcntl.LOCK_UN)
            self._log.close()

    def _forget(self) -> None:
        """Remove what an attempt that never came to a checkpoint computed."""
        self._facts_file.unlink(missing_ok=True)
        for further in self._facts_file.parent.glob("*/"):
            shutil.rmtree(further)

    def _cut_log(self) -> None:
        """Take away the lines that were written after the checkpoint."""
        if not self.ranks.first:
            return
        known = 0 if self.pending is None else self.pending["log_bytes"]
        if known < self._log.seek(0, os.SEEK_END):
            self._log.truncate(known)
        self._log.seek(0)
        self._log_sum = hashlib.sha256(self._log.read(known))
        if self.pending is not None and self._log_sum.hexdigest() != self.pending["log_sha256"]:
            self._noted(f"{self._log.name} is damaged: not all of it is what the run wrote")

    def _numbers(self) -> list[int]:
        found = (self.folder / "checkpoints").glob("[0-9]*.json")
        return sorted(int(path.stem) for path in found)

    def _find_checkpoint(self) -> None:
        try:
            self._facts = read_sealed(self._facts_file) if self._facts_file.exists() else {}
        except CheckpointError as error:
            self._noted(f"{error}; the checkpoint's copy is used")
        for weights in self._facts_file.parent.glob("[0-9]*.safetensors"):
            if not weights.with_suffix(".json").exists():  # a kill came between the two
                weights.unlink()
        numbers = self._numbers()
        self._number = numbers[-1] if numbers else 0
        for number in reversed(numbers):
            try:
                self.pending = read_state(self.folder / "checkpoints" / f"{number:06d}")
            except CheckpointError as error:
                self._noted(f"{error}; the one before it is used")
                continue
            self._facts = json.loads(self.pending["facts"]) | self._facts
            self._earlier = self.pending["elapsed"]
            self._teacher_seconds, self._spent_before = self.pending["teacher"]
            threads = self.pending["threads"]
            if self.settings.threads is None and threads != torch.get_num_threads():
                torch.set_num_threads(threads)
            return
        if numbers:
            raise CheckpointError(f"every checkpoint of {self.folder} is damaged: start the run anew")

    def _restore(self, state: State, turns: Sequence[Turn]) -> None:
        load_variable_state(self.modules, state["modules"])
        if state["stage"] not in state["done"]:
            for turn in turns:
                turn.optimizer.load_state_dict(state["optimizers"][turn.name])
                shards.take_part(turn.optimizer)
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.done, self.seconds = list(state["done"]), dict(state["seconds"])
        self.pending = None
        for text in self._found:
            self.log("warning", text=text)

    def __enter__(self) -> Run:
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)
        self._rng = torch.get_rng_state()
        self.meter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.finish()
        self.tracking.close()
        self._let_go()
        torch.set_rng_state(self._rng)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()
        self.meter.note("stopping after this step; once more to stop at once")
