from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from limbeck.contracts import Progress
from limbeck.engine import meter as module
from limbeck.engine.meter import Meter


def at(step: int, steps: int = 10) -> Progress:
    return Progress(step=step, steps=steps)


def made(*, terminal: bool) -> tuple[Meter, io.StringIO]:
    """A meter that writes into memory."""
    written = io.StringIO()
    meter = Meter()
    meter.console = Console(file=written, force_terminal=terminal, width=120)
    return meter, written


def play(meter: Meter) -> None:
    meter.start()
    meter.plan = {"task0/teacher": 10, "task0/student": 10, "task1/teacher": 20}
    meter.step("task0/teacher", at(3), 2.0)
    meter.show(1.5, {"labels": 1.0, "kd": 0.5}, 0.25)
    meter.step("task0/teacher", at(4), 2.0)
    meter.step("task0/student", at(8), 1.0)
    meter.show(0.5, {"labels": 0.25, "kd": 0.25}, 0.5)
    meter.step("task0/student", at(9), 1.0)
    meter.finish()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", -1)
    meter, written = made(terminal=False)
    play(meter)
    _, first, new, second = written.getvalue().splitlines()
    terms = "loss 1.500  labels 1.000  kd 0.500  teacher 25%"
    assert first == f"task0/teacher  step 5/10  0:01:10 left  {terms}"  # 5 + 10 + 20 steps of 2 s
    assert "loss" not in new  # what the teacher's stage showed last is not the student's
    assert second.startswith("task0/student  step 10/10  0:00:40 left  loss 0.500")  # 20 teacher's steps
    assert "\x1b" not in written.getvalue()


def test_plain_lines_come_at_intervals() -> None:
    meter, written = made(terminal=False)
    play(meter)
    assert written.getvalue() == ""


def test_a_bar_in_a_terminal() -> None:
    meter, written = made(terminal=True)
    play(meter)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    assert "task0/student" in text
    assert "10/10" in text
    assert "kd 0.250" in text
    assert meter.bar is None


def test_quiet_shows_warnings_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", -1)
    meter = Meter(quiet=True)
    play(meter)
    meter.note("warning: something")
    assert capfd.readouterr() == ("", "warning: something\n")


def test_brackets_of_a_note_are_no_markup(capfd: pytest.CaptureFixture[str]) -> None:
    Meter().note("warning: views.scale is [1, 2] in [red]a[/red]")
    assert capfd.readouterr().err == "warning: views.scale is [1, 2] in [red]a[/red]\n"


def test_time_left_of_a_stage_that_was_not_announced() -> None:
    meter, _ = made(terminal=False)
    meter.step("train", at(3), 3.0)
    assert meter.left("train", at(3)) == "0:00:18"


def test_hours() -> None:
    meter, _ = made(terminal=False)
    meter.step("train", at(0, 5001), 2.0)
    assert meter.left("train", at(0, 5001)) == "2:46:40"
