"""The curves of training: every loss term and every term's share of the gradient, stage after stage."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from limbeck.report.charts import Chart, Point, Series, line_chart
from limbeck.report.run import Event, Run

# How many colours the style sheet has for terms in one chart.
COLOURS = 6
# A curve of so few points is drawn with a dot at each: a line through one point cannot be seen.
MOST_MARKED = 60
# Tasks are named in the charts where there are at most this many stages.
MOST_NAMED = 24
TOTAL = "total"


Place = tuple[str, str]
"""A task's part of a role's curve: (``task3``, ``student``)."""


@dataclass
class Track:
    """What one role (teacher, student) logged, its stages laid end to end.

    Attributes:
        pieces: by term, one piece of curve for each stage.
        starts: where each stage begins, and its task; no name where tasks are too many to name.
    """

    pieces: dict[str, list[list[Point]]] = field(default_factory=dict)
    starts: list[tuple[float, str]] = field(default_factory=list)


def place_of(stage: str, term: str = "") -> Place:
    """The task and the role of a term: a stage in which both learn names the role before the term.

    ``task3/student``, ``kd`` -> (``task3``, ``student``); ``task3/joint``, ``teacher/labels`` ->
    (``task3``, ``teacher``).
    """
    task, _, role = stage.rpartition("/")
    return task, term.rpartition("/")[0] or role


def term_charts(run: Run) -> tuple[dict[str, list[Chart]], list[str]]:
    """One chart for each loss term, by role, and a line for each term that has holes.

    The total stands first where it has more than one term.
    """
    steps = list(run.of("step"))
    tracks, holes = _tracks(steps, _terms, _layout(steps))
    drawn = {}
    for role, track in tracks.items():
        css = "teacher" if role == "teacher" else "student"
        names = [name for name in track.pieces if name != TOTAL or len(track.pieces) > 2]
        found = [_chart(name, [_series(name, css, track)], track, "loss") for name in names]
        drawn[role] = [chart for chart in found if chart is not None]
    return {role: found for role, found in drawn.items() if found}, holes


def share_charts(run: Run) -> dict[str, Chart]:
    """Each term's share of the norm of the gradient in percent, one chart a role with several terms."""
    tracks, _ = _tracks(list(run.of("gradient_share")), _shares, _layout(list(run.of("step"))))
    drawn = {}
    for role, track in tracks.items():
        if len(track.pieces) < 2:
            continue
        series = [_series(name, f"c{i % COLOURS}", track) for i, name in enumerate(track.pieces)]
        chart = _chart(f"Share of the gradient, {role}", series, track, "share, %", (0.0, 100.0), " %")
        if chart is not None:
            drawn[role] = chart
    return drawn


def _terms(event: Event) -> dict[str, float | None]:
    """The terms of a step, and their sum where one role alone learns."""
    terms = event["terms"]
    return terms if any("/" in name for name in terms) else {TOTAL: event["loss"], **terms}


def _shares(event: Event) -> dict[str, float | None]:
    return {name: None if share is None else 100 * share for name, share in event["shares"].items()}


def _layout(steps: Sequence[Event]) -> dict[Place, float]:
    """Where each stage begins on its role's axis: what is logged now and then is laid on the same one."""
    lengths: dict[Place, int] = {}
    for event in steps:
        for place in {place_of(str(event["stage"]), name) for name in _terms(event)}:
            lengths[place] = max(lengths.get(place, 0), int(event["step"]) + 1)
    starts, ends = {}, defaultdict[str, float](float)
    for (task, role), length in lengths.items():
        starts[task, role] = ends[role]
        ends[role] += length
    return starts


def _tracks(
    events: Sequence[Event], read: Callable[[Event], dict[str, float | None]], starts: Mapping[Place, float]
) -> tuple[dict[str, Track], list[str]]:
    """The events laid end to end by role, and a line for each term that was not finite somewhere."""
    pieces: dict[tuple[Place, str], list[Point]] = {}
    holes: Counter[tuple[str, str]] = Counter()
    for event in events:
        for name, value in read(event).items():
            place = place_of(str(event["stage"]), name)
            if place not in starts:
                continue
            if value is None or not math.isfinite(value):
                holes[str(event["stage"]), name] += 1
            else:
                piece = pieces.setdefault((place, name.rpartition("/")[2]), [])
                piece.append((starts[place] + event["step"], value))
    tracks: dict[str, Track] = {}
    for ((_, role), name), piece in pieces.items():
        tracks.setdefault(role, Track()).pieces.setdefault(name, []).append(piece)
    few = len(starts) <= MOST_NAMED
    for (task, role), start in starts.items():
        if role in tracks:
            tracks[role].starts.append((start, task.removeprefix("task") if few else ""))
    return tracks, [
        f"{stage}: the term {name!r} was not finite at {n} logged steps; the curve leaves them out"
        for (stage, name), n in holes.items()
    ]


def _series(name: str, css: str, track: Track) -> Series:
    pieces = tuple(tuple(piece) for piece in track.pieces[name])
    return Series(name, css, pieces, marks=sum(map(len, pieces)) <= MOST_MARKED)


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
