"""A comparison as text: a few narrow tables rather than one that no screen holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.report import figures
from limbeck.report.figures import Figure

if TYPE_CHECKING:
    from limbeck.report.compare import Comparison, Spread

# So many figures fit beside a method's name on 80 columns.
ABREAST = 3


def render(comparison: Comparison, *, ascii_only: bool = False) -> Iterator[RenderableType]:
    """The comparison piece by piece: notes, tables, differences, protocol."""
    for note in comparison.notes:
        yield Text(f"note: {note}", style="yellow")
    if comparison.notes:
        yield Text()
    sign = _plus_minus(ascii_only)
    yield Text(f"mean {sign} standard deviation over seeds; below it the 95 % interval (t)", style="dim")
    own = {method.label: method.spreads for method in comparison.methods}
    for row in _rows(comparison.figures):
        yield Text()
        yield _table(own, row, ascii_only)
    against = {method.label: method.differences for method in comparison.methods if method.differences}
    if against:
        yield Text()
        yield Text(f"minus {comparison.baseline}, seed by seed", style="bold")
        yield Text("*: the interval leaves out zero; where nothing differs, one in twenty does", style="dim")
        for row in _rows([f for f in comparison.figures if any(f.path in d for d in against.values())]):
            yield Text()
            yield _table(against, row, ascii_only, signed=True)
    yield Text()
    yield Text("protocol", style="bold")
    yield _protocol(comparison)


def _rows(shown: Sequence[Figure]) -> Iterator[Sequence[Figure]]:
    """Figures that stand in one table: of one kind, and no more than fit."""
    kinds: dict[str, list[Figure]] = {}
    for figure in shown:
        kinds.setdefault(_kind(figure), []).append(figure)
    for kind in kinds.values():
        abreast = len(kind) if _kind(kind[0]) == "cost" else ABREAST
        for start in range(0, len(kind), abreast):
            yield kind[start : start + abreast]


def _kind(figure: Figure) -> str:
    """What a figure is about: task, forgetting, calibration, fidelity, cost."""
    who, _, name = figure.path.partition(".")
    if figure.path in (figures.ECE.path, figures.NLL.path, figures.BRIER.path):
        return "calibration"
    return "forgetting" if name.startswith("forgetting") else who


def _table(
    rows: Mapping[str, Mapping[str, Spread]],
    columns: Sequence[Figure],
    ascii_only: bool,
    signed: bool = False,
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("", overflow="fold")
    table.add_column("n", justify="right")
    for figure in columns:
        table.add_column(_heading(figure), justify="right")
    for label, spreads in rows.items():
        found = [spreads.get(figure.path) for figure in columns]
        seeds = {spread.n for spread in found if spread}
        if seeds:
            cells = (_cell(f, s, ascii_only, signed) for f, s in zip(columns, found, strict=True))
            table.add_row(label, str(max(seeds)), *cells)
    return table


def _heading(figure: Figure) -> str:
    unit = {"%": ", %", "nats": ", nats"}.get(figure.unit, "")
    return f"{figure.label}{unit}"


def _cell(figure: Figure, spread: Spread | None, ascii_only: bool, signed: bool) -> str:
    if spread is None:
        return "-"
    text = _number(figure, spread.mean, signed)
    if figure.path.startswith("cost."):
        return text
    if spread.sd is None or spread.interval is None:
        return f"{text}\n(one seed)"
    low, high = spread.interval
    star = "* " if signed and (low > 0 or high < 0) else ""
    return (
        f"{star}{text} {_plus_minus(ascii_only)} {_number(figure, spread.sd, False)}\n"
        f"{_number(figure, low, signed)} to {_number(figure, high, signed)}"
    )


def _number(figure: Figure, value: float, signed: bool) -> str:
    text = figures.number(value, figure.unit).removesuffix(" %")
    return f"+{text}" if signed and value > 0 else text


def _plus_minus(ascii_only: bool) -> str:
    return "+/-" if ascii_only else "±"


def _protocol(comparison: Comparison) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in figures.protocol_lines(comparison.protocol):
        grid.add_row(f"  {name}", text)
    for name, text in (comparison.protocol.get("forgetting_definitions") or {}).items():
        grid.add_row(f"  forgetting ({name})", text)
    return grid
