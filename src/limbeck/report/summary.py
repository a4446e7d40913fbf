"""The block that a run ends with: figures, and beside them the protocol and the definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.report import figures
from limbeck.report.figures import Figure
from limbeck.report.run import finished, read_run
from limbeck.terminal import Terminal


def summary(result: Mapping[str, Any]) -> RenderableType:
    """The result block of a run, for a rich console; plain text where that is no terminal.

    Args:
        result: what stands in ``result.json``.
    """
    found = figures.figures_of(result)
    cost = [figure for figure in found if figure.path.startswith("cost.")]
    task = [figure for figure in found if figure not in cost]
    blocks: list[RenderableType] = [_title(result), Text(), _figures(result, task)]
    paths = figures.paths_of(result)
    if paths:
        blocks += [Text(), Text("the teacher's paths", style="bold"), _rows(paths)]
    nested = figures.nested_of(result)
    if nested:
        blocks += [Text(), Text("networks within the student", style="bold"), _rows(nested)]
    if cost:
        blocks += [Text(), _figures(result, cost)]
    protocol = figures.protocol_lines(result.get("protocol") or {})
    if protocol:
        blocks += [Text(), Text("protocol", style="bold"), _pairs(protocol)]
    definitions = figures.lookup(result, "protocol.forgetting_definitions") or {}
    if definitions:
        blocks += [Text(), Text("forgetting, by definition", style="bold"), _pairs(definitions.items())]
    return Group(*blocks)


def print_summary(run_dir: str | Path, console: Console | None = None) -> None:
    """Print the result block of a finished run.

    Raises:
        DataError: the folder is no run's, the run has not finished, or a file in it is damaged.
    """
    (console or Terminal()).print(summary(finished(read_run(run_dir))))


def _title(result: Mapping[str, Any]) -> Text:
    facts = [f"{name} {result[name]}" for name in ("scenario", "data", "seed") if name in result]
    seconds = figures.lookup(result, "time.seconds")
    if seconds is not None:
        facts.append(figures.duration(float(seconds)))
    return Text.assemble((str(result.get("recipe", "run")), "bold"), "  ", (", ".join(facts), "dim"))


def _figures(result: Mapping[str, Any], rows: Sequence[Figure]) -> Table:
    """Student and teacher side by side; what compares the two stands with the student."""
    between = [figure.interval(result) for figure in rows]
    others = [figures.of_teacher(figure).of(result) for figure in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("student", justify="right", no_wrap=True)
    if any(between):
        table.add_column("95 % interval", no_wrap=True)
    if any(other is not None for other in others):
        table.add_column("teacher", justify="right", no_wrap=True)
    for figure, interval, other in zip(rows, between, others, strict=True):
        cells = [
            figure.label + (", points" if figure.unit == "points" else ""),
            figure.text(figure.of(result)),
        ]
        if any(between):
            cells.append(interval)
        cells.append("" if other is None else figure.text(other))
        table.add_row(*cells[: len(table.columns)], style="bold" if figure is rows[0] else None)
    return table


def _rows(rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows of one table, their names to the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    first, *others = rows[0]
    table.add_column("" if first == "path" else first)
    for name in others:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(f"  {name}", str(text))
    return grid
