"""The page of an arena: a ranking that can be cited, one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import plain
from limbeck.engine.state import write_text
from limbeck.report import figures
from limbeck.report.charts import Tick, axis
from limbeck.report.page import environment

ACCURACY = figures.ACCURACY
COLUMNS = (figures.AGREEMENT, figures.CKA, figures.NLL, figures.ECE)
"""What stands beside the accuracy in the table, where the runs have it."""
ABOVE = ("data", "epochs", "batch", "interval")
"""What of the protocol the page says in words of its own."""
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 520, 118, 12, 10, 24, 40


@dataclass(frozen=True, slots=True)
class Row:
    """A method in canvas units: its seeds, the mean and the ends of the interval."""

    name: str
    y: float
    seeds: tuple[float, ...]
    mean: float
    low: float
    high: float
    css: str
    text: str


@dataclass(frozen=True, slots=True)
class Forest:
    """A row for each method along one axis, in canvas units."""

    title: str
    x_label: str
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    line: float | None
    height: int
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP


def write_arena(data: Mapping[str, Any], path: Path) -> Path:
    """Write the page of what ``limbeck.arena`` found.

    Args:
        data: the content of the arena's JSON file.
        path: the HTML file; one that stood there is replaced whole.
    """
    write_text(path, page(data))
    return path


def page(data: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    return environment().get_template("arena.html.j2").render(
        data=data,
        levels=(),
        facts=_facts(data),
        forests=_forests(data),
        columns=[figure for figure in COLUMNS if figure.path in data["figures"]],
        accuracy=ACCURACY,
        rows=data["ranking"],
        protocol=[line for line in figures.protocol_lines(data["protocol"]) if line[0] not in ABOVE],
        cost=[(who, _cost(price)) for who, price in data["cost"].items() if price],
        networks={who: plain.write({who: network}).rstrip() for who, network in data["networks"].items()},
        teacher=_teacher(data),
        written=lambda row: plain.write({"objective": row["objective"]}).rstrip(),
        number=figures.number,
        duration=figures.duration,
    )  # fmt: skip


def _facts(data: Mapping[str, Any]) -> list[str]:
    return [
        f"data {data['data']['name']}",
        f"{len(data['ranking'])} methods",
        f"{len(data['seeds'])} seeds",
        f"{data['budget']['steps']} steps each",
    ]


def _teacher(data: Mapping[str, Any]) -> str:
    """The teacher's accuracy: that of every seed where they differ."""
    known = [value for value in data["teacher_figures"].values() if value is not None]
    if not known:
        return "not measured"
    low, high = min(known), max(known)
    return f"{low:.1f} %" if low == high else f"{low:.1f} to {high:.1f} % over the seeds"


def _cost(price: Mapping[str, Any]) -> str:
    return (
        f"{figures.count(price['parameters'])} parameters, "
        f"{figures.count(price['multiply_adds'])} multiply-adds for one image"
    )


def _forests(data: Mapping[str, Any]) -> list[Forest]:
    """The accuracy of each method, and its paired difference from the baseline."""
    ranking, baseline = data["ranking"], data["baseline"]
    own = [(row["method"], row["figures"][ACCURACY.path]) for row in ranking]
    none = {"values": {}, "mean": 0.0, "interval": [0.0, 0.0]}
    paired = [(row["method"], row["differences"].get(ACCURACY.path, none)) for row in ranking]
    at = next(spread["mean"] for name, spread in own if name == baseline)
    return [
        _forest("Accuracy on the test split", own, at, f"accuracy, % (line: {baseline})", data),
        _forest(
            f"Accuracy minus that of {baseline}, seed by seed",
            paired,
            0.0,
            "points of accuracy",
            data,
        ),
    ]


def _forest(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    line: float,
    x_label: str,
    data: Mapping[str, Any],
) -> Forest:
    reach = [line, *(x for _, spread in rows for x in (*spread["values"].values(), *spread["interval"]))]
    spare = 0.03 * (max(reach) - min(reach))
    ends = [min(reach) - spare, max(reach) + spare]
    scale, ticks = axis(ends, LEFT, WIDTH - RIGHT, ticks=6, tight=True)
    return Forest(
        title,
        x_label,
        tuple(
            Row(
                name,
                TOP + ROW * (place + 0.5),
                tuple(scale(x) for x in spread["values"].values()),
                scale(spread["mean"]),
                scale(spread["interval"][0]),
                scale(spread["interval"][1]),
                "teacher" if name in (data["baseline"], "ce") else "student",
                f"{name}: {spread['mean']:.2f}, {spread['interval'][0]:.2f} to {spread['interval'][1]:.2f}",
            )
            for place, (name, spread) in enumerate(rows)
        ),
        ticks,
        scale(line),
        TOP + ROW * len(rows) + BOTTOM,
    )
