"""The geometry of the page's charts: values in, places on a small canvas out.

Nothing here knows a colour: a line carries a CSS class, and the page's style sheet decides, once for light
and once for dark. Canvases are about as wide as a phone, so that text keeps its size wherever they stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 26, 36
# A curve of more points is drawn as the mean and the range of this many runs of neighbouring points.
MOST_POINTS = 400
BUCKETS = 130
# A positive curve that spans more than this is drawn on a logarithmic axis.
LOG_RANGE = 100.0
# What a tooltip or a reader's voice says of a value.
DIGITS = 4

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line to draw: finite points in order of x, in one or more unconnected pieces.

    ``css`` is the line's class; ``marks`` draws a dot at every point, with its value as a tooltip.
    """

    name: str
    css: str
    pieces: tuple[tuple[Point, ...], ...]
    marks: bool = False

    @property
    def points(self) -> list[Point]:
        return [point for piece in self.pieces for point in piece]


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot with a tooltip."""

    x: float
    y: float
    text: str
    radius: float = 2.8


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with a tooltip; ``x``, ``y`` is its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series in canvas units: SVG path data of the line and of the range around it."""

    name: str
    css: str
    path: str
    band: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart in canvas units. ``said`` is what a reader hears who cannot see it."""

    title: str
    said: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    dividers: tuple[Tick, ...] = ()
    diagonal: str = ""
    bars: tuple[Bar, ...] = ()
    zero: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to canvas units, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (at - low) / (high - low) * (self.stop - self.start), 1)


def axis(
    values: Sequence[float],
    start: float,
    stop: float,
    *,
    ticks: int = 5,
    whole: bool = False,
    log: bool = False,
    tight: bool = False,
) -> tuple[Scale, tuple[Tick, ...]]:
    """A scale over ``values`` and its ticks at round numbers.

    Args:
        values: what must fit.
        start: canvas unit of the low end.
        stop: canvas unit of the high end.
        ticks: how many steps at most.
        whole: ticks at whole numbers only.
        log: logarithmic; every value must be positive.
        tight: end at the values rather than at the next tick.
    """
    low, high = min(values), max(values)
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        scale = Scale(low, high, start, stop, log=True)
        places = LogLocator(base=10, numticks=ticks + 1).tick_values(low, high)
    else:
        if low == high:
            low, high = (low - 0.5, high + 0.5) if whole else (min(low, 0.0), high if high > 0 else 1.0)
        places = MaxNLocator(ticks, integer=whole, steps=[1, 2, 5, 10]).tick_values(low, high)
        if not tight:
            low, high = min(low, places[0]), max(high, places[-1])
        scale = Scale(low, high, start, stop)
    inside = [float(p) for p in places if low - 1e-12 <= p <= high + 1e-12]
    digits = _digits(inside)
    return scale, tuple(Tick(scale(p), f"{p:g}" if log else f"{p:.{digits}f}") for p in inside)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    whole_x: bool = False,
    dividers: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
    unit: str = "",
) -> Chart | None:
    """Lines over x; None where there is nothing to draw.

    Args:
        title: what is shown.
        series: the lines.
        x_label: name and unit of the horizontal axis.
        y_label: name and unit of the vertical axis.
        whole_x: x counts something.
        dividers: values of x at which a new stage begins, with its name.
        y_range: values that the vertical axis must hold; from 0 where all values are positive by default.
        unit: what follows a value in a tooltip.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return None
    ys = [y for _, y in points]
    log = y_range is None and min(ys) > 0 and max(ys) / min(ys) > LOG_RANGE
    held = ys if log else [*ys, *(y_range or (0.0,))]
    across = [x for x, _ in points] + [x for x, _ in dividers]
    x_scale, x_ticks = axis(across, LEFT, WIDTH - RIGHT, ticks=6, whole=whole_x, tight=True)
    y_scale, y_ticks = axis(held, HEIGHT - BOTTOM, TOP, log=log)
    return Chart(
        title,
        "; ".join(filter(None, (_said(one, unit) for one in series))),
        x_label,
        f"{y_label}, logarithmic" if log else y_label,
        x_ticks,
        y_ticks,
        tuple(_line(one, x_scale, y_scale, unit) for one in series),
        dividers=tuple(Tick(x_scale(x), name) for x, name in dividers),
        zero=y_scale(0.0) if not log and y_scale.low < 0 < y_scale.high else None,
    )


def bar_chart(
    title: str, values: Sequence[float], *, x_label: str, y_label: str, unit: str = ""
) -> Chart | None:
    """One bar for each task, from zero up or down; None where there is none."""
    if not values:
        return None
    places = range(len(values))
    x_scale, _ = axis([-0.6, len(values) - 0.4], LEFT, WIDTH - RIGHT, tight=True)
    y_scale, y_ticks = axis([0.0, *values], HEIGHT - BOTTOM, TOP)
    width = min(34.0, 0.62 * (x_scale(1) - x_scale(0)))
    bars = []
    for x, value in zip(places, values, strict=True):
        top, bottom = sorted((y_scale(value), y_scale(0.0)))
        tip = f"{x_label} {x}: {value:.1f}{unit}"
        bars.append(Bar(round(x_scale(x) - width / 2, 1), top, round(width, 1), round(bottom - top, 1), tip))
    step = max(1, math.ceil(len(places) / 10))
    said = ", ".join(f"{x_label} {x}: {v:.1f}{unit}" for x, v in zip(places, values, strict=True))
    return Chart(
        title,
        said,
        x_label,
        y_label,
        tuple(Tick(x_scale(x), str(x)) for x in places[::step]),
        y_ticks,
        (),
        bars=tuple(bars),
        zero=y_scale(0.0),
    )


def reliability_chart(
    title: str, bins: Sequence[tuple[float, float, int]], css: str, what: str = "images"
) -> Chart | None:
    """Accuracy over confidence, both 0 to 1; dots grow with the share of samples in their bin.

    Args:
        title: what is shown.
        bins: (confidence, accuracy, count); empty bins are left out.
        css: the class of line and dots.
        what: what is counted, in the plural.
    """
    filled = [b for b in bins if b[2] > 0]
    if not filled:
        return None
    size = 320
    x_scale, x_ticks = axis([0.0, 1.0], LEFT, size - RIGHT)
    y_scale, y_ticks = axis([0.0, 1.0], size - BOTTOM, TOP)
    total = sum(count for *_, count in filled)
    points = tuple((confidence, accuracy) for confidence, accuracy, _ in filled)
    marks = tuple(
        Mark(
            x_scale(confidence),
            y_scale(accuracy),
            f"confidence {confidence:.2f}, accuracy {accuracy:.2f}, {count} {what}",
            round(2.5 + 9 * math.sqrt(count / total), 1),
        )
        for confidence, accuracy, count in filled
    )
    line = _line(Series(title, css, (points,)), x_scale, y_scale, "")
    return Chart(
        title,
        "; ".join(mark.text for mark in marks),
        "confidence",
        "accuracy",
        x_ticks,
        y_ticks,
        (replace(line, marks=marks),),
        diagonal=f"M{x_scale(0)} {y_scale(0)}L{x_scale(1)} {y_scale(1)}",
        width=size,
        height=size,
        right=size - RIGHT,
        bottom=size - BOTTOM,
    )


def thin(piece: Sequence[Point], most: int) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """A curve in at most ``most`` points.

    Returns:
        The points themselves and no range where they are few enough; else for each run of neighbours the
        mean (x, y) and the range (x, lowest y, highest y).
    """
    if len(piece) <= most:
        return list(piece), []
    edges = [round(i * len(piece) / most) for i in range(most + 1)]
    runs = [piece[a:b] for a, b in pairwise(edges) if b > a]
    means = [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
    ranges = [
        (x, min(y for _, y in run), max(y for _, y in run)) for (x, _), run in zip(means, runs, strict=True)
    ]
    return means, ranges


def _line(series: Series, x_scale: Scale, y_scale: Scale, unit: str) -> Line:
    total = len(series.points)
    path, band = [], []
    for piece in series.pieces:
        most = len(piece) if total <= MOST_POINTS else max(1, len(piece) * BUCKETS // total)
        means, ranges = thin(piece, most)
        path.append(_path([(x_scale(x), y_scale(y)) for x, y in means]))
        around = [(x, high) for x, _, high in ranges] + [(x, low) for x, low, _ in reversed(ranges)]
        if around:
            band.append(_path([(x_scale(x), y_scale(y)) for x, y in around]) + "Z")
    marks = [
        Mark(x_scale(x), y_scale(y), f"{series.name}, {x:g}: {y:.{DIGITS}g}{unit}") for x, y in series.points
    ]
    return Line(series.name, series.css, "".join(path), "".join(band), tuple(marks) if series.marks else ())


def _path(points: Sequence[Point]) -> str:
    """SVG path data through ``points``; one point alone becomes a dot of no length."""
    if not points:
        return ""
    ends = points if len(points) > 1 else [*points, *points]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in ends)


def _said(series: Series, unit: str) -> str:
    points = series.points
    if not points:
        return ""
    if series.marks:
        return f"{series.name}: " + ", ".join(f"{y:.{DIGITS}g}{unit}" for _, y in points)
    ys = [y for _, y in points]
    return (
        f"{series.name}: from {ys[0]:.3g}{unit} to {ys[-1]:.3g}{unit}, "
        f"lowest {min(ys):.3g}{unit}, highest {max(ys):.3g}{unit}"
    )


def _digits(places: Sequence[float]) -> int:
    """How many decimals tell neighbouring ticks apart."""
    if len(places) < 2:
        return 0
    return max(0, -math.floor(math.log10(places[1] - places[0]) + 1e-9))
