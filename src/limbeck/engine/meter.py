"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from limbeck.contracts import Progress
from limbeck.terminal import Terminal

PLAIN_SECONDS = 10.0


class Meter:
    """Shows stage, step, time left, the loss terms and the teacher's share of the step.

    The time left counts the stages that were announced by ``plan`` at the pace seen so far.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False) -> None:
        self.console = Terminal(stderr=True, quiet=quiet or mute)
        # warnings are shown in any case, but by one process alone
        self.notes = Terminal(stderr=True) if quiet and not mute else self.console
        self.plan: dict[str, int] = {}
        self.pace: dict[str, float] = {}
        self.text = ""
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.last_line = time.monotonic()

    def start(self) -> None:
        """Begin to show."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.fields[stage]:<16}"), BarColumn(None), MofNCompleteColumn())
            state = TextColumn("{task.fields[left]} left  {task.fields[text]}")
            self.bar = Bar(*columns, state, console=self.console)
            self.bar.start()

    def finish(self) -> None:
        """Stop to show."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._print(self.notes, text)

    @staticmethod
    def _print(console: Terminal, text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, stage: str, at: Progress, seconds: float) -> None:
        """A step of ``stage`` took ``seconds``."""
        kind = stage.rpartition("/")[2]
        self.pace[kind] = 0.95 * self.pace.get(kind, seconds) + 0.05 * seconds
        if stage != self.stage:
            self.stage, self.text = stage, ""
            if self.bar is not None:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(stage, total=at.steps, stage=stage, left="", text="")
        if self.bar is not None:
            assert self.task is not None
            self.bar.update(self.task, completed=at.step + 1, left=self.left(stage, at), text=self.text)
        elif time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line = time.monotonic()
            line = f"{stage}  step {at.step + 1}/{at.steps}  {self.left(stage, at)} left  {self.text}"
            self._print(self.console, line)

    def show(self, loss: float, terms: dict[str, float], teacher_share: float) -> None:
        """New values of the loss terms."""
        parts = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        self.text = f"loss {loss:.3f}  {parts}  teacher {teacher_share:.0%}"

    def left(self, stage: str, at: Progress) -> str:
        """Time left of the run, as far as it was announced, else of the stage."""
        names = list(self.plan)
        later = names[names.index(stage) + 1 :] if stage in self.plan else []
        mean = sum(self.pace.values()) / len(self.pace)
        seconds = (at.steps - at.step - 1) * self.pace[stage.rpartition("/")[2]]
        seconds += sum(self.plan[name] * self.pace.get(name.rpartition("/")[2], mean) for name in later)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
