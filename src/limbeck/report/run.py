"""A run folder as the report reads it: the recipe, the final figures and what was logged on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import UndefinedError
from pydantic import BaseModel, ValidationError

from limbeck import plain
from limbeck.engine.state import read_json
from limbeck.errors import CheckpointError, DataError, LimbeckError

Event = Mapping[str, Any]


class Step(BaseModel):
    """What a line about a step holds, of what is read here."""

    stage: str
    step: int
    loss: float
    terms: dict[str, float]


class Share(BaseModel):
    """The same of a line about the gradient."""

    stage: str
    step: int
    shares: dict[str, float | None]


class Evaluation(BaseModel):
    """The same of a line about an evaluation."""

    who: str
    task: int
    accuracy: list[float | None] = []


class Warned(BaseModel):
    """The same of a warning."""

    text: str


LINES: dict[str, type[BaseModel]] = {
    "step": Step, "gradient_share": Share, "evaluation": Evaluation, "warning": Warned,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        folder: where it lies.
        recipe_text: ``recipe.yaml`` as written.
        recipe: the same, parsed.
        result: ``result.json``; None while the run is unfinished.
        events: the lines of ``metrics.jsonl`` in the order written. A step that was logged again after a
            resume stands once, as last written.
    """

    folder: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    result: Mapping[str, Any] | None
    events: tuple[Event, ...]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's where the recipe has none."""
        written = self.result or self.recipe
        return str(written.get("recipe") or written.get("name") or self.folder.name)

    def of(self, kind: str) -> Iterator[Event]:
        """The events of one kind."""
        return (event for event in self.events if event.get("event") == kind)

    def warnings(self) -> list[str]:
        """The warnings; one that came again at other steps stands once, with how often it came."""
        found: dict[str, list[str]] = {}
        for event in self.of("warning"):
            found.setdefault(re.sub(r", step \d+(?=:)", "", str(event["text"])), []).append(
                str(event["text"])
            )
        return [
            texts[0] if len(texts) == 1 else f"{text} ({len(texts)} times)" for text, texts in found.items()
        ]

    def term_means(self) -> dict[str, dict[str, float]]:
        """The mean over the logged steps of each loss term, weighted as in the loss, by stage and term."""
        found: dict[str, dict[str, list[float]]] = {}
        for event in self.of("step"):
            stage = found.setdefault(str(event["stage"]), {})
            for name, value in event["terms"].items():
                stage.setdefault(name, []).append(float(value))
        return {
            stage: {name: fmean(values) for name, values in terms.items()} for stage, terms in found.items()
        }

    def logged_matrix(self, who: str) -> list[list[float | None]] | None:
        """The accuracy matrix as far as it was logged; None where ``who`` was never evaluated.

        Rows are tasks learnt, columns tasks tested, percent; None above the diagonal.
        """
        rows = {int(e["task"]): list(e["accuracy"]) for e in self.of("evaluation") if e.get("who") == who}
        seen = [rows[t] for t in range(len(rows)) if t in rows]
        return [row[: t + 1] + [None] * (len(seen) - t - 1) for t, row in enumerate(seen)] or None


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder is no run's, or a file in it is damaged.
        ConfigError: its recipe.yaml is damaged.
    """
    folder = Path(folder)
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise DataError(f"{folder} is no run folder: recipe.yaml is missing; name a folder that a run wrote")
    text = _text(recipe)
    fields = plain.mapping(plain.parse(text, str(recipe)), str(recipe))
    return Run(folder, text, fields, _read_result(folder), tuple(_read_events(folder / "metrics.jsonl")))


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Where a run's files hold other things than a run writes, what is made of them ends in one line.

    Args:
        what: what is read, for the message.

    Raises:
        DataError: it cannot be understood.
    """
    try:
        yield
    except LimbeckError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise DataError(
            f"{what} holds what no run writes ({type(error).__name__}: {_one_line(error)}): take a folder "
            "as a run left it"
        ) from error


def finished(run: Run) -> Mapping[str, Any]:
    """The final figures of ``run``.

    Raises:
        DataError: the run has not finished.
    """
    if run.result is None:
        raise DataError(
            f"{run.folder} has no result.json: the run has not finished; `limbeck resume {run.folder}`"
        )
    return run.result


def _read_result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = read_json(path)
    except CheckpointError as error:
        raise DataError(f"{error}; `limbeck resume {folder}` writes it anew") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from None
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {_one_line(error)}; `limbeck resume {folder}` writes it anew"
        ) from None
    if not isinstance(result, dict) or not isinstance(result.get("student"), dict):
        raise DataError(f"{path} is damaged: no field 'student'; `limbeck resume {folder}` writes it anew")
    return result


def _read_events(path: Path) -> list[Event]:
    """The events, steps de-duplicated; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = _text(path).split("\n")
    while lines and not lines[-1]:
        lines.pop()
    kept: dict[object, Event] = {}
    for number, line in enumerate(lines):
        try:
            event = _event(line)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise DataError(
                f"{path} is damaged at line {number + 1}: {_one_line(error)}; delete that line"
            ) from None
        key = _identity(event, number)
        kept.pop(key, None)
        kept[key] = event
    return list(kept.values())


def _event(line: str) -> Event:
    """The event of a line; ``ValueError`` where it is none."""
    event = plain.from_json(line)
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("no event")
    try:
        if event["event"] in LINES:
            LINES[event["event"]].model_validate(event)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    return event


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from None


def _identity(event: Event, number: int) -> object:
    """What two lines share when a resumed run wrote the same thing twice."""
    kind = event.get("event")
    if kind in ("step", "gradient_share"):
        return kind, event.get("stage"), event.get("step")
    if kind == "evaluation":
        return kind, event.get("who"), event.get("task")
    if kind == "warning":
        return kind, event.get("text")
    return number


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
