"""Matrices as the page shows them: a table of coloured cells, or a map where cells are too many to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Depths of colour; 0 is the paper, LEVELS the full ink.
LEVELS = 10
# Up to here a confusion matrix is a table with numbers; above, a map.
MOST_NUMBERED = 20
# A map of more classes sums neighbours, so that the page stays small.
MOST_MAPPED = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: what it shows, how deep its colour is (0 to LEVELS) and what a pointer on it says."""

    text: str
    level: int
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """How often images of the class ``true`` were called ``said``: ``share`` in percent of the class."""

    true: str
    said: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """A confusion matrix, ready to be drawn.

    Attributes:
        names: the classes.
        cells: rows of the table (true class) in percent of the class; empty where ``levels`` is used.
        levels: SVG path data by depth of colour, one unit a cell, for a map of ``size`` x ``size``.
        size: cells along one side of the map.
        merged: how many neighbouring classes share one cell of the map.
        recall: accuracy of each class in percent; None where the test set has no image of it.
        mistakes: the most frequent mistakes first.
    """

    names: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    levels: tuple[tuple[int, str], ...]
    size: int
    merged: int
    recall: tuple[float | None, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def hardest(self) -> list[tuple[str, float]]:
        """The five classes with the lowest accuracy, in percent."""
        known = [(n, r) for n, r in zip(self.names, self.recall, strict=True) if r is not None]
        return sorted(known, key=lambda pair: pair[1])[:5]


def level(share: float) -> int:
    """The depth of colour of ``share`` in 0..1."""
    return max(0, min(LEVELS, round(share * LEVELS)))


def accuracy_cells(matrix: Sequence[Sequence[float | None]]) -> list[list[Cell | None]]:
    """Cells of an accuracy matrix in percent; None above the diagonal."""
    return [
        [
            None
            if value is None
            else Cell(f"{value:.1f}", level(value / 100), f"after task {t}, on task {i}: {value:.1f} %")
            for i, value in enumerate(row)
        ]
        for t, row in enumerate(matrix)
    ]


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], *, mistakes: int = 10) -> Confusion:
    """A confusion matrix of ``counts`` (rows true, columns said) for ``names``."""
    totals = [sum(row) for row in counts]
    recall = tuple(100 * counts[c][c] / total if total else None for c, total in enumerate(totals))
    wrong = sorted(
        (
            (count, true, said)
            for true, row in enumerate(counts)
            for said, count in enumerate(row)
            if true != said and count
        ),
        key=lambda one: (-one[0], one[1], one[2]),
    )
    worst = tuple(Mistake(names[t], names[s], n, 100 * n / totals[t]) for n, t, s in wrong[:mistakes])
    numbered = len(names) <= MOST_NUMBERED
    merged = -(-len(names) // MOST_MAPPED)
    grouped = counts if merged == 1 else _merge(counts, merged)
    return Confusion(
        tuple(names),
        _cells(counts, names, totals) if numbered else (),
        () if numbered else _levels(grouped),
        len(grouped),
        merged,
        recall,
        worst,
    )


def _cells(
    counts: Sequence[Sequence[int]], names: Sequence[str], totals: Sequence[int]
) -> tuple[tuple[Cell, ...], ...]:
    return tuple(
        tuple(
            Cell(
                f"{100 * count / total:.0f}" if count else "",
                level(count / total) if total else 0,
                f"{names[true]} called {names[said]}: {count} of {total}",
            )
            for said, count in enumerate(row)
        )
        for true, (row, total) in enumerate(zip(counts, totals, strict=True))
    )


def _levels(counts: Sequence[Sequence[int]]) -> tuple[tuple[int, str], ...]:
    """One path for each depth of colour: far smaller than a rectangle for each cell."""
    paths: dict[int, list[str]] = defaultdict(list)
    for true, row in enumerate(counts):
        total = sum(row)
        for said, count in enumerate(row):
            if count:
                paths[max(1, level(count / total))].append(f"M{said} {true}h1v1h-1z")
    return tuple((depth, "".join(path)) for depth, path in sorted(paths.items()))


def _merge(counts: Sequence[Sequence[int]], by: int) -> list[list[int]]:
    size = -(-len(counts) // by)
    merged = [[0] * size for _ in range(size)]
    for true, row in enumerate(counts):
        for said, count in enumerate(row):
            merged[true // by][said // by] += count
    return merged
