"""A study of many students: does what they gain from a teacher go with how near they came to it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from limbeck.errors import ConfigError, DataError, unknown
from limbeck.metrics.statistics import Cell, Outcome, anova, holm, improvements, spearman, t_above_zero
from limbeck.report.figures import lookup
from limbeck.report.run import Run, finished, read_run, understood

QUALITY = "student.accuracy"
SIZE = "cost.student.parameters"
# What a gain is correlated with, each of the distilled run, besides what the teacher and the baseline have.
TRAITS = {
    "size of the student": SIZE,
    "agreement": "fidelity.agreement",
    "KL": "fidelity.kl",
    "BLEU with the teacher": "fidelity.bleu",
}
TEACHER, BASELINE = "teacher", "student without teacher"
BEST = "the best of all methods, for each student"


@dataclass(frozen=True)
class Finding:
    """One statistical test.

    Attributes:
        question: what is asked.
        of: the method that it is asked of; empty where of all students together.
        outcome: statistic and p.
        n: students that it rests on.
        adjusted: p after Holm, over all tests of the study.
    """

    question: str
    of: str
    outcome: Outcome
    n: int
    adjusted: float = float("nan")


@dataclass(frozen=True)
class Study:
    """What ``study`` found; prints itself on a rich console.

    Attributes:
        figure: what a gain is a gain of.
        baseline: the recipe of the students without teacher.
        gains: by method, each student with its gain and traits.
        tests: in the order of the questions.
    """

    figure: str
    baseline: str
    gains: Mapping[str, Sequence[Mapping[str, Any]]]
    tests: tuple[Finding, ...]

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "figure": self.figure,
            "baseline": self.baseline,
            "gains": {method: list(each) for method, each in self.gains.items()},
            "tests": [
                {**asdict(t), "outcome": {"statistic": t.outcome.statistic, "p": t.outcome.p}}
                for t in self.tests
            ],
            "note": "students of one size or seed are not independent; Holm allows for the number of tests",
        }

    @property
    def text(self) -> Study:
        """What a rich console prints: this."""
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"gain in {self.figure} over {self.baseline}"
        table = Table("question", "of", "n", "statistic", "p", "p, Holm", box=None)
        for test in self.tests:
            numbers = (test.outcome.statistic, test.outcome.p, test.adjusted)
            shown = ["-" if x != x else f"{x:.3g}" for x in numbers]
            table.add_row(test.question, test.of or "all", str(test.n), *shown)
        yield table


@understood("one of the runs")
def study(run_dirs: Iterable[str | Path], *, baseline: str, figure: str = QUALITY) -> Study:
    """What distilled students gain over the same students without a teacher, and what that goes with.

    Students are paired by size (parameters), data and seed. The questions are the paper's: is the mean gain
    above 0 (t test of each method, and of each student's best), do the methods differ (analysis of variance),
    and Spearman's correlation of the gain with the student's size, the teacher's own figure, agreement, KL,
    BLEU with the teacher's answers where there are any, and the student's figure without a teacher.

    Args:
        run_dirs: folders of finished runs: those of ``baseline``, and distilled ones.
        baseline: recipe of the students that learnt without a teacher.
        figure: dotted path in ``result.json`` of what is gained.

    Raises:
        DataError: a folder is no run's, its run has not finished, two are of one student and method, or no
            student has a counterpart.
        ConfigError: no run of the baseline, or of anything else.

    Source: Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442), hypotheses H1 to H5.
    Differs: the paper takes for each student the best temperature before it tests; here each method is tested
    by itself, and the best beside them.
    """
    runs = [read_run(folder) for folder in run_dirs]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    if baseline not in groups:
        raise unknown("baseline", baseline, groups)
    if len(groups) < 2:
        raise ConfigError(f"all runs are of {baseline}: name distilled ones too")
    alone = {cell: value_of(run, figure) for cell, run in by_cell(groups.pop(baseline)).items()}
    gains = {method: gains_of(own, alone, figure) for method, own in groups.items()}
    tests = [*by_method(gains), *together([row for rows in gains.values() for row in rows])]
    adjusted = holm([test.outcome.p for test in tests])
    found = tuple(Finding(t.question, t.of, t.outcome, t.n, p) for t, p in zip(tests, adjusted, strict=True))
    return Study(figure, baseline, gains, found)


def cell_of(run: Run) -> Cell:
    """Which student a run trained, on what."""
    result = finished(run)
    return Cell(size=str(lookup(result, SIZE)), task=str(result.get("data")), seed=int(result["seed"]))


def by_cell(runs: Sequence[Run]) -> dict[Cell, Run]:
    """The runs of one method by the student that they trained.

    Raises:
        DataError: two trained the same one.
    """
    found: dict[Cell, Run] = {}
    for run in runs:
        other = found.setdefault(cell_of(run), run)
        if other is not run:
            raise DataError(
                f"{other.folder} and {run.folder} are both {run.name}, of one size and seed: leave one out, "
                "or run one with --set name=..."
            )
    return found


def value_of(run: Run, figure: str) -> float:
    """A figure of a finished run.

    Raises:
        ConfigError: the run does not have it.
    """
    value = lookup(finished(run), figure)
    if value is None:
        raise ConfigError(f"figure is {figure} but {run.folder} has none: name one of its result.json")
    return float(value)


def gains_of(runs: Sequence[Run], alone: Mapping[Cell, float], figure: str) -> list[dict[str, Any]]:
    """Each student's gain, with its traits."""
    own = by_cell(runs)
    traits = TRAITS | {TEACHER: f"teacher.{figure.rpartition('.')[2]}"}
    found = improvements({cell: value_of(run, figure) for cell, run in own.items()}, alone)
    return [
        {
            **asdict(cell), "gain": gain, BASELINE: alone[cell],
            **{name: lookup(finished(own[cell]), path) for name, path in traits.items()},
        }
        for cell, gain in found.items()
    ]  # fmt: skip


def by_method(gains: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """Is the mean gain of each method above 0, and that of the best; do the methods differ?"""
    found = [above_zero(rows, method) for method, rows in gains.items()]
    if len(gains) > 1:
        best: dict[tuple[str, str, int], Mapping[str, Any]] = {}
        for rows in gains.values():
            for row in rows:
                key = (row["size"], row["task"], row["seed"])
                best[key] = max(best.get(key, row), row, key=gain_of)
        values = [(gain_of(row), method) for method, rows in gains.items() for row in rows]
        differ = anova([gain for gain, _ in values], [method for _, method in values])
        found += [
            above_zero(list(best.values()), BEST),
            Finding("do the methods differ?", "", differ, len(values)),
        ]
    return found


def above_zero(rows: Sequence[Mapping[str, Any]], of: str) -> Finding:
    """Whether students gain."""
    return Finding("is the gain above 0?", of, t_above_zero([gain_of(row) for row in rows]), len(rows))


def together(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the gain goes with, over all students that have the trait."""
    found = []
    for trait in (*TRAITS, TEACHER, BASELINE):
        known = [row for row in rows if row[trait] is not None]
        if known:
            outcome = spearman([gain_of(row) for row in known], [float(row[trait]) for row in known])
            found.append(Finding(f"does the gain go with: {trait}?", "", outcome, len(known)))
    return found


def gain_of(row: Mapping[str, Any]) -> float:
    """What one student gained."""
    return float(row["gain"])
