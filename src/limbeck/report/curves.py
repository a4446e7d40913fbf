"""The curves of training: every loss term and every term's share of the gradient, stage after stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from limbeck.report.charts import Chart, Point, Series, line_chart
from limbeck.report.run import Event, Run

# How many colours the style sheet has for terms in one chart.
COLOURS = 6
# Tasks are named in the charts where there are at most this many stages.
MOST_NAMED = 24
TOTAL = "total"


@dataclass
class Track:
    """What one role (teacher, student) logged over its stages, laid end to end.

    Attributes:
        pieces: by name, one piece of curve for each stage.
        starts: where each stage begins, and its task; no name where tasks are too many to name.
        length: steps so far.
    """

    pieces: dict[str, list[list[Point]]] = field(default_factory=dict)
    starts: list[tuple[float, str]] = field(default_factory=list)
    length: float = 0.0


def role_of(stage: str) -> str:
    """Who learns in a stage: ``task3/student`` -> ``student``."""
    return stage.rpartition("/")[2]


def task_of(stage: str) -> str:
    """The task of a stage, in short: ``task3/student`` -> ``3``; empty where it has none."""
    return stage.rpartition("/")[0].removeprefix("task")


def term_charts(run: Run) -> tuple[dict[str, list[Chart]], list[str]]:
    """One chart for each loss term, by role, and a line for each term that has holes.

    The total stands first where it has more than one term.
    """
    steps = list(run.of("step"))
    tracks, holes = _tracks(steps, _terms, _lengths(steps))
    drawn = {}
    for role, track in tracks.items():
        css = "teacher" if role == "teacher" else "student"
        names = [name for name in track.pieces if name != TOTAL or len(track.pieces) > 2]
        found = [_chart(name, [_series(name, css, track)], track, "loss") for name in names]
        drawn[role] = [chart for chart in found if chart is not None]
    return {role: found for role, found in drawn.items() if found}, holes


def share_charts(run: Run) -> dict[str, Chart]:
    """Each term's share of the norm of the gradient in percent, one chart a role."""
    tracks, _ = _tracks(list(run.of("gradient_share")), _shares, _lengths(list(run.of("step"))))
    drawn = {}
    for role, track in tracks.items():
        series = [_series(name, f"c{i % COLOURS}", track) for i, name in enumerate(track.pieces)]
        chart = _chart(f"Share of the gradient, {role}", series, track, "share, %", (0.0, 100.0), " %")
        if chart is not None:
            drawn[role] = chart
    return drawn


def _terms(event: Event) -> dict[str, float | None]:
    return {TOTAL: event.get("loss"), **event.get("terms", {})}


def _shares(event: Event) -> dict[str, float | None]:
    return {name: None if share is None else 100 * share for name, share in event["shares"].items()}


def _lengths(steps: Sequence[Event]) -> dict[str, int]:
    """How many steps each stage took: what is logged now and then is laid on the same axis."""
    lengths: dict[str, int] = {}
    for event in steps:
        stage = str(event["stage"])
        lengths[stage] = max(lengths.get(stage, 0), int(event["step"]) + 1)
    return lengths


def _tracks(
    events: Sequence[Event], read: Callable[[Event], dict[str, float | None]], lengths: Mapping[str, int]
) -> tuple[dict[str, Track], list[str]]:
    """The events laid end to end by role, and a line for each term that was not finite somewhere."""
    tracks: dict[str, Track] = {}
    holes: Counter[tuple[str, str]] = Counter()
    by_stage: dict[str, list[Event]] = {}
    for event in events:
        by_stage.setdefault(str(event["stage"]), []).append(event)
    for stage, logged in by_stage.items():
        track = tracks.setdefault(role_of(stage), Track())
        start = track.length
        pieces: dict[str, list[Point]] = {}
        for event in logged:
            for name, value in read(event).items():
                if value is None or not math.isfinite(value):
                    holes[stage, name] += 1
                else:
                    pieces.setdefault(name, []).append((start + event["step"], value))
        for name, piece in pieces.items():
            track.pieces.setdefault(name, []).append(piece)
        track.starts.append((start, task_of(stage) if len(by_stage) <= MOST_NAMED else ""))
        track.length = start + lengths.get(stage, 1)
    return tracks, [
        f"{stage}: the term {name!r} was not finite at {n} logged steps; the curve leaves them out"
        for (stage, name), n in holes.items()
    ]


def _series(name: str, css: str, track: Track) -> Series:
    return Series(name, css, tuple(tuple(piece) for piece in track.pieces[name]))


def _chart(
    title: str,
    series: Sequence[Series],
    track: Track,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    unit: str = "",
) -> Chart | None:
    return line_chart(
        title,
        series,
        x_label="optimiser step",
        y_label=y_label,
        whole_x=True,
        dividers=track.starts if len(track.starts) > 1 else (),
        y_range=y_range,
        unit=unit,
    )
