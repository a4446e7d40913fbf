"""The page of a run: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined

from limbeck.engine.state import write_text
from limbeck.errors import shown
from limbeck.metrics.continual import DEFINITIONS, FORGETTING, forgetting, running_average
from limbeck.report import charts, figures
from limbeck.report.curves import share_charts, term_charts
from limbeck.report.distances import hacking_charts
from limbeck.report.figures import Figure, lookup
from limbeck.report.heat import LEVELS, accuracy_cells, confusion
from limbeck.report.run import Run, read_run, understood

PAGE = "report.html"
WHO = ("student", "teacher")
CALIBRATION = (figures.ECE, figures.NLL, figures.BRIER)


def write_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, finished or not.

    Args:
        run_dir: the run's folder.
        out: the file to write; ``report.html`` in the folder by default.

    Returns:
        The file written. One that stood there before is replaced whole.

    Raises:
        DataError: the folder is no run's, or a file in it is damaged.
        CheckpointError: the page cannot be written.
    """
    run = read_run(run_dir)
    path = Path(out) if out is not None else run.folder / PAGE
    with understood(str(run.folder)):
        text = page(run)
    write_text(path, text)
    return path


def page(run: Run) -> str:
    """The page as HTML text."""
    result = run.result or {}
    curves, gaps = term_charts(run)
    return environment().get_template("page.html.j2").render(
        run=run,
        result=result,
        levels=range(LEVELS + 1),
        subtitle=_subtitle(run),
        tiles=_tiles(result),
        protocol=_protocol(result),
        definitions=lookup(result, "protocol.forgetting_definitions") or DEFINITIONS,
        matrices=_matrices(run),
        over_tasks=_over_tasks(run),
        by_task=_by_task(result),
        confusions=_confusions(result),
        reliability=_reliability(result),
        calibration=_versus(result, _named(result, CALIBRATION)),
        domains=_versus(result, figures.domains_of(result)),
        secrets=_secrets(result),
        what=_what(result),
        unit="row of tokens" if figures.of_text(result) else "image",
        paths=figures.paths_of(result),
        nested=figures.nested_of(result),
        search=_search(result),
        selection=_selection(result),
        hacking=hacking_charts(result),
        curves=curves,
        shares=share_charts(run),
        warnings=[*run.warnings(), *gaps],
        cost=_versus(result, _named(result, figures.COST)),
        stages=_stages(run),
        duration=figures.duration,
    )  # fmt: skip


def environment() -> Environment:
    """Where pages find their templates: the files of this folder, with all that is filled in escaped, control
    characters too."""

    def load(name: str) -> str:
        return files("limbeck.report").joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        finalize=lambda value: shown(value) if type(value) is str else value,  # Markup is HTML already
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["transposed"] = lambda columns: zip(*columns, strict=True)
    return environment


def _subtitle(run: Run) -> list[str]:
    """What the run was, in a few words."""
    written = run.result or run.recipe
    facts = []
    for field in ("scenario", "data", "seed"):
        value = written.get(field)
        name = value.get("name") if isinstance(value, Mapping) else value
        if name is not None:
            facts.append(f"{field} {name}")
    seconds = lookup(run.result or {}, "time.seconds")
    if seconds is not None:
        facts.append(figures.duration(float(seconds)))
    return facts


def _protocol(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The protocol, and the licence of the data, as pairs."""
    lines = figures.protocol_lines(result.get("protocol") or {})
    kept = result.get("teacher_cache")
    if kept:
        text = f"{kept['kept']} of {kept['tokens']} tokens at each place; the others had a probability of "
        lines.append(("kept of the teacher", f"{text}{kept['left_out']:.3f} in the mean"))
    own = result.get("writing")
    if own:
        text = f"{own['written']} written, in a share of the batches that went from {own['share'][0]:.2f} to "
        lines.append(("texts of its own", f"{text}{own['share'][-1]:.2f}"))
    licence = result.get("data_licence")
    return [*lines, ("licence of the data", str(licence))] if licence else lines


def _tiles(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline figures, each with its interval, its meaning and the teacher's value."""
    tiles = []
    for figure in figures.figures_of(result):
        if figure.path.startswith(("cost.", "student.domain_perplexity.")):
            continue
        if figure in (figures.NLL, figures.BRIER) and lookup(result, "student.accuracy_matrix"):
            continue
        other = figures.of_teacher(figure).of(result)
        tiles.append(
            {
                "figure": figure,
                "value": figure.text(figure.of(result)),
                "interval": figure.interval(result),
                "teacher": None if other is None else figure.text(other),
            }
        )
    return tiles


def _secrets(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The planted secrets, one row each, with their exposure to both networks in bits."""
    told = []
    for canary in lookup(result, "exposure.canaries") or []:
        bits = {who: figures.number(canary.get(who), "bits") for who in WHO}
        most = figures.number(canary["at_most"], "bits")
        told.append({"text": canary["format"], **bits, "at most": most, "found by": canary["method"]})
    return told


def _named(result: Mapping[str, Any], rows: Sequence[Figure]) -> list[Figure]:
    """Those of ``rows`` that the result has, in the words that fit it."""
    paths = [figure.path for figure in rows]
    return [figure for figure in figures.figures_of(result) if figure.path in paths]


def _versus(result: Mapping[str, Any], rows: Sequence[Figure]) -> list[dict[str, Any]]:
    """Student against teacher, one row a figure; ``ratio`` is the student's part of the teacher's."""
    table = []
    for figure in rows:
        student, teacher = figure.of(result), figures.of_teacher(figure).of(result)
        if student is None:
            continue
        ratio = f"{student / teacher:.2f}" if teacher else "-"
        table.append(
            {
                "figure": figure,
                "student": figure.text(student),
                "teacher": figure.text(teacher),
                "ratio": ratio,
            }
        )
    return table


def _matrix(run: Run, who: str) -> list[list[float | None]] | None:
    """The final accuracy matrix, or what was logged of it so far."""
    if run.result is None:
        return run.logged_matrix(who)
    matrix: list[list[float | None]] | None = lookup(run.result, f"{who}.accuracy_matrix")
    return matrix


def _matrices(run: Run) -> list[dict[str, Any]]:
    found = ((who, _matrix(run, who)) for who in WHO)
    return [{"who": who, "rows": accuracy_cells(matrix)} for who, matrix in found if matrix]


def _over_tasks(run: Run) -> list[charts.Chart]:
    """Accuracy, forgetting and the gap as the stream goes on."""
    # None above the diagonal becomes NaN, which the metrics never read.
    filled = {who: np.array(m, dtype=np.float64) for who in WHO if (m := _matrix(run, who))}
    running = {who: running_average(matrix) for who, matrix in filled.items()}
    title = "Average accuracy so far"
    drawn = [_task_chart(title, running, "accuracy, %", (0.0, 100.0), " %")]
    for name in FORGETTING:
        lost = {
            who: [forgetting(matrix[:t, :t], name) for t in range(1, len(matrix) + 1)]
            for who, matrix in filled.items()
        }
        drawn.append(_task_chart(f"Forgetting ({name})", lost, "points"))
    gap = lookup(run.result or {}, "fidelity.gap_per_task") or []
    drawn.append(
        charts.bar_chart(
            "Teacher minus student, at the end", gap, x_label="task", y_label="points", unit=" points"
        )
    )
    over = {"gap": lookup(run.result or {}, "fidelity.gap_over_tasks") or []}
    drawn.append(_task_chart("Teacher minus student, average so far", over, "points"))
    same = {"agreement": lookup(run.result or {}, "fidelity.agreement_over_tasks") or []}
    drawn.append(_task_chart("Student and teacher say the same", same, "agreement, %", (0.0, 100.0), " %"))
    return [chart for chart in drawn if chart is not None]


def _task_chart(
    title: str,
    lines: Mapping[str, Iterable[float]],
    y_label: str,
    y_range: tuple[float, float] | None = None,
    unit: str = " points",
) -> charts.Chart | None:
    series = [
        charts.Series(
            who,
            who if who in WHO else "student",
            (tuple((float(t + 1), y) for t, y in enumerate(values)),),
            marks=True,
        )
        for who, values in lines.items()
    ]
    return charts.line_chart(
        title, series, x_label="tasks learnt", y_label=y_label, whole_x=True, y_range=y_range, unit=unit
    )


def _by_task(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """What stands behind the curves, as columns of one table."""
    columns: dict[str, list[float | None] | None] = {}
    for who in WHO:
        matrix = lookup(result, f"{who}.accuracy_matrix")
        if matrix:
            columns[f"{who}: just learnt"] = [row[t] for t, row in enumerate(matrix)]
            columns[f"{who}: at the end"] = matrix[-1]
            columns[f"{who}: average so far"] = lookup(result, f"{who}.running_average")
            columns[f"{who}: right keys"] = lookup(result, f"{who}.key_accuracy")
    columns["gap at the end"] = lookup(result, "fidelity.gap_per_task")
    columns["gap of the averages"] = lookup(result, "fidelity.gap_over_tasks")
    return {
        name: ["-" if v is None else f"{v:.1f}" for v in values] for name, values in columns.items() if values
    }


def _confusions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    drawn = []
    for who in WHO:
        counts, names = lookup(result, f"{who}.confusion"), lookup(result, f"{who}.class_names")
        if counts and names:
            drawn.append({"who": who, "map": confusion(counts, names), "bounds": _task_bounds(result)})
    return drawn


def _task_bounds(result: Mapping[str, Any]) -> list[int]:
    """The class at which each task but the first begins."""
    sizes = lookup(result, "protocol.sizes") or []
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [start for start, _ in pairwise(bounds) if start]


def _what(result: Mapping[str, Any]) -> str:
    """What is counted."""
    return "tokens" if figures.of_text(result) else "images"


def _reliability(result: Mapping[str, Any]) -> list[charts.Chart]:
    drawn = []
    for who in WHO:
        bins = lookup(result, f"{who}.reliability") or []
        table = [(b["confidence"], b["accuracy"], b["count"]) for b in bins]
        drawn.append(charts.reliability_chart(f"Reliability of the {who}", table, who, _what(result)))
    return [chart for chart in drawn if chart is not None]


def _selection(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a selector found out, as pairs; of a long list how long it is."""
    found = result.get("selection") or {}
    short = {
        name: f"{len(value)} values" if isinstance(value, list) and len(value) > figures.LONGEST else value
        for name, value in found.items()
    }
    return figures.protocol_lines(short)


def _search(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a search was about, as pairs; of its candidates how many there are."""
    found = result.get("search") or {}
    return figures.protocol_lines(
        {name: len(value) if name == "candidates" else value for name, value in found.items()}
    )


def _stages(run: Run) -> list[dict[str, Any]]:
    """Seconds of each stage, with its part of the longest for the bar."""
    seconds: Mapping[str, float] = lookup(run.result or {}, "time.stages") or {}
    reused = {event["stage"] for event in run.of("teacher_reused")}
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {
            "name": f"{name}, from an earlier run" if name in reused else name,
            "seconds": figures.duration(value),
            "part": round(100 * value / longest, 1),
            "who": "teacher" if name.endswith("teacher") else "student",
        }
        for name, value in seconds.items()
    ]
