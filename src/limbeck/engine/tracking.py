"""Trackers: the points of ``metrics.jsonl`` told to other tools too, in ``tracking/`` of the run's folder.

Points are put by the number of optimiser steps of the whole run. What a tracker lacks is filled in from the
log when it is opened, and what it has is not told again: so a resumed run goes on in the same tracked run,
and points may wait a while before they are handed over. Nothing here uses a network.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from limbeck import plain
from limbeck.errors import ConfigError, unknown

Values = dict[str, float]
Points = Sequence[tuple[int, Values]]
Event = Mapping[str, Any]

FLUSH_SECONDS = 5.0
UNTRACKED = ("protocol", "versions", "terms", "seed")


class Tracker:
    """One tool with one tracked run.

    Args:
        folder: of the run; the tool's own files go into ``tracking`` there.
        recipe: the run's recipe as plain data.
    """

    needs: ClassVar[tuple[str, ...]]
    """Packages."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def known(self) -> set[tuple[str, int]]:
        """Names and steps of the points that the tracked run has."""
        raise NotImplementedError

    def add(self, points: Points) -> None:
        """Take points, and put them on disk."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing comes any more."""


class TensorBoard(Tracker):
    """Event files in ``tracking/tensorboard``."""

    needs = ("tensorboard",)

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tracking" / "tensorboard"
        fresh = not self.folder.exists()
        self.writer: Any = SummaryWriter(str(self.folder))
        if fresh:
            text = "\n".join(f"    {line}" for line in plain.write(dict(recipe)).splitlines())
            self.writer.add_text("recipe", text)

    def known(self) -> set[tuple[str, int]]:
        """See ``Tracker``."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0}).Reload()
        return {(name, point.step) for name in events.Tags()["scalars"] for point in events.Scalars(name)}

    def add(self, points: Points) -> None:
        """See ``Tracker``."""
        for step, values in points:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """See ``Tracker``."""
        self.writer.close()


class MLflow(Tracker):
    """The data base ``tracking/mlflow.db``, which holds this run alone."""

    needs = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        place = (folder / "tracking").resolve()
        place.mkdir(exist_ok=True)
        self.client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
        found = self.client.get_experiment_by_name("limbeck")
        experiment = found.experiment_id if found else self.client.create_experiment("limbeck", str(place))
        runs = self.client.search_runs([experiment])
        run = runs[0] if runs else self.client.create_run(experiment, run_name=folder.name)
        self.run: str = run.info.run_id
        if not runs:
            params = [Param(allowed(name), str(value)[:6000]) for name, value in flat(recipe).items()]
            for start in range(0, len(params), 100):  # as many as it takes at once
                self.client.log_batch(self.run, params=params[start : start + 100])

    def known(self) -> set[tuple[str, int]]:
        """See ``Tracker``."""
        names = self.client.get_run(self.run).data.metrics
        history = ((name, self.client.get_metric_history(self.run, name)) for name in names)
        return {(name, point.step) for name, points in history for point in points}

    def add(self, points: Points) -> None:
        """See ``Tracker``."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, step) for step, values in points for name, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):  # as many as it takes at once
            self.client.log_batch(self.run, metrics=metrics[start : start + 1000])

    def close(self) -> None:
        """See ``Tracker``."""
        self.client.set_terminated(self.run)


class Trackio(Tracker):
    """The data base ``tracking/limbeck.db``, written by trackio's storage without its server and threads."""

    needs = ("trackio",)
    project = "limbeck"

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        from trackio import sqlite_storage, utils

        self.place, self.name = (folder / "tracking").resolve(), folder.name
        self.modules: tuple[Any, ...] = (utils, sqlite_storage)
        self.storage = sqlite_storage.SQLiteStorage
        self.config: dict[str, Any] | None = flat(recipe)

    def known(self) -> set[tuple[str, int]]:
        """See ``Tracker``."""
        self._here()
        rows = self.storage.get_logs(self.project, self.name)
        return {(name, row["step"]) for row in rows for name in row if name not in ("step", "timestamp")}

    def add(self, points: Points) -> None:
        """See ``Tracker``."""
        self._here()
        steps, values = [step for step, _ in points], [values for _, values in points]
        self.storage.bulk_log(self.project, self.name, values, steps=steps, config=self.config)
        self.config = None

    def _here(self) -> None:
        """Its folder is one for the whole process: another run may have set its own."""
        for module in self.modules:
            module.TRACKIO_DIR = self.place


TRACKERS: dict[str, type[Tracker]] = {"trackio": Trackio, "tensorboard": TensorBoard, "mlflow": MLflow}


class Tracking:
    """The trackers of a run. One that fails is left out from then on, with one warning.

    Args:
        folder: the run's.
        names: of ``TRACKERS``.
        warn: shows a warning.

    Raises:
        ConfigError: a tracker's package is missing.
    """

    def __init__(self, folder: Path, names: Sequence[str], warn: Callable[[str], None]) -> None:
        self.folder, self.names, self.warn = folder, names, warn
        check_packages(names)
        self.trackers: dict[str, Tracker] = {}
        self.had: dict[str, set[tuple[str, int]]] = {}
        self.waiting: list[tuple[int, Values]] = []
        self.axis, self.opened, self.flushed = Axis(), False, time.monotonic()

    def tell(self, event: Event) -> None:
        """An event was logged."""
        if not self.names:
            return
        if self.opened:
            self.waiting += self.axis.points(event)
        else:
            self._open()  # which finds the event in the log
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def conclude(self, figures: Mapping[str, Any]) -> None:
        """The run has these final figures."""
        if not self.names:
            return
        if not self.opened:
            self._open()
        kept = {name: value for name, value in figures.items() if name not in UNTRACKED}
        single = {name: value for name, value in flat(kept).items() if not re.search(r"\.\d+(\.|$)", name)}
        self.waiting.append((self.axis.last, named("final", single)))
        self._flush()

    def close(self) -> None:
        """Hand over what waits."""
        if self.opened:
            self._flush()
            for name, tracker in list(self.trackers.items()):
                self._guarded(name, tracker.close)
        self.trackers = {}

    def _open(self) -> None:
        self.opened = True
        recipe = plain.read(self.folder / "recipe.yaml")
        for name in self.names:
            self._guarded(name, partial(self._start, name, recipe))
        for event in events_of(self.folder / "metrics.jsonl"):
            self.waiting += self.axis.points(event)

    def _start(self, name: str, recipe: Mapping[str, Any]) -> None:
        tracker = TRACKERS[name](self.folder, recipe)
        self.had[name] = tracker.known()
        self.trackers[name] = tracker

    def _flush(self) -> None:
        waiting, self.waiting, self.flushed = self.waiting, [], time.monotonic()
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, partial(tracker.add, list(lacking(waiting, self.had[name]))))

    def _guarded(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # of several packages and many families
            self.trackers.pop(name, None)
            why = " ".join(str(error).split())[:200]
            self.warn(f"tracker {name} is left out: {type(error).__name__}: {why}")


class Axis:
    """Puts the events of a log on one axis: the optimiser steps of the whole run."""

    def __init__(self) -> None:
        self.stage, self.before, self.last = "", 0, 0

    def points(self, event: Event) -> Iterator[tuple[int, Values]]:
        """The points of an event; the events must come in the order of the log."""
        if event["event"] == "step":
            if event["stage"] != self.stage:
                self.stage, self.before = event["stage"], self.last
            self.last, kind = self.before + event["step"] + 1, self.stage.rpartition("/")[2]
            values = {name: event[name] for name in ("loss", "lr", "teacher_share")}
            values |= {f"terms/{name}": value for name, value in event["terms"].items()}
            yield self.last, named(kind, values)
        if event["event"] == "evaluation":
            parts = {f"task{task}": value for task, value in enumerate(event["accuracy"])}
            parts["mean"] = sum(parts.values()) / len(parts)
            yield self.last, named(f"evaluation/{event['who']}", parts)


def check_names(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a name that is no tracker's."""
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS, where="engine.track")


def check_packages(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` where a tracker cannot be imported."""
    for name in names:
        lacking = [package for package in TRACKERS[name].needs if find_spec(package) is None]
        if lacking:
            raise ConfigError(
                f"engine.track has {name}, which needs {', '.join(lacking)}, not installed here: "
                "pip install 'limbeck[track]', or leave it out"
            )


def lacking(points: Points, had: set[tuple[str, int]]) -> Iterator[tuple[int, Values]]:
    """The points that are not among those ``had``."""
    for step, values in points:
        new = {name: value for name, value in values.items() if (name, step) not in had}
        if new:
            yield step, new


def events_of(log: Path) -> Iterator[Event]:
    """The events of a log."""
    if log.exists():
        with log.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested plain data by dotted path; lists count from 0."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value)).items()
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, part in parts:
        found |= flat(part, f"{name}.{key}" if name else str(key))
    return found


def named(kind: str, values: Mapping[str, Any]) -> Values:
    """Those of ``values`` that are finite numbers, with ``kind`` before their names."""
    return {
        allowed(f"{kind}/{name}"): value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def allowed(name: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^\w\-. /]", "_", name)
