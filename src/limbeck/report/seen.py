"""All demonstrations of a folder as one table, written beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.engine.state import write_text
from limbeck.report.markdown import inline

STREAM = {
    "student.average_accuracy": "A",
    "student.just_learned": "J",
    "student.forgetting.cdl": "F (cdl)",
    "teacher.average_accuracy": "A of the teacher",
    "fidelity.agreement": "agreement",
}
STATIC = {
    "student.accuracy": "accuracy",
    "teacher.accuracy": "teacher's",
    "fidelity.agreement": "agreement",
    "student.nll": "NLL",
    "student.ece": "ECE",
}
HEAD = """# What was seen

Written by `limbeck demonstrate` from the JSON files beside it; each of these names its command, protocol,
seeds and versions. Mean ± standard deviation over seeds; accuracies in percent, NLL in nats. Differences are
paired by seed, with 95 % intervals.
"""
ON_STREAMS = """
## Streams of tasks

A is the accuracy averaged over all tasks after the last one, J the same right after each task was learnt,
F (cdl) = J - A.
"""
FINE = (
    "nll", "ece", "brier", "kl", "reverse_kl", "rank_correlation", "cka", "squared_error", "golden_last",
    "loss", "proxy_last", "trust",
)  # fmt: skip
"""Figures of another scale than percent."""
Seen = Mapping[str, Any]


def write_index(folder: Path) -> Path:
    """Write ``README.md`` in ``folder`` from its ``*.json`` demonstrations.

    Returns:
        The file.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    streams = [each for each in found if "student.average_accuracy" in _own(each)["figures"]]
    static = [each for each in found if each not in streams]
    lines = [HEAD]
    if static:
        lines += ["## One data set", "", *_table(static, STATIC, 1, with_data=True)]
    if streams:
        lines += [ON_STREAMS, *_table(streams, STREAM, 3)]
    lines += ["", "## What the papers lead one to expect", ""]
    lines += ["| recipe | prediction | seen | difference |", "| --- | --- | --- | --- |"]
    lines += [line for each in found for line in _predictions(each)]
    path = folder / "README.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _table(
    found: Sequence[Seen], columns: Mapping[str, str], compared: int, with_data: bool = False
) -> list[str]:
    """The figures, and the differences of the first ``compared`` of them from the baselines."""
    first = ["recipe", *(["data"] if with_data else []), "seeds"]
    lines = [_line([*first, *columns.values()]), "| --- " * (len(first) + len(columns)) + "|"]
    for each in found:
        own, data = _own(each), [inline(each["protocol"].get("data", "-"))] if with_data else []
        cells = [_spread(own["figures"].get(path), path) for path in columns]
        lines.append(_line([each["recipe"], *data, str(len(own["seeds"])), *cells]))
    lines += ["", _line(["recipe", "minus", *list(columns.values())[:compared]])]
    lines.append("| --- " * (2 + compared) + "|")
    for each in found:
        for name, differences in each["differences"].items():
            cells = [_interval(differences.get(path)) for path in list(columns)[:compared]]
            lines.append(_line([each["recipe"], name, *cells]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _own(seen: Seen) -> Seen:
    found: Seen = next(m for m in seen["methods"].values() if m["recipe"] == seen["recipe"])
    return found


def _spread(figure: Mapping[str, Any] | None, path: str) -> str:
    if figure is None:
        return "-"
    places = 3 if path.rpartition(".")[2] in FINE else 1
    return f"{figure['mean']:.{places}f} ± {figure['sd']:.{places}f}"


def _interval(figure: Mapping[str, Any] | None, path: str = "") -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    places = 3 if path.rpartition(".")[2] in FINE else 1
    return f"{figure['mean']:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"


def _predictions(seen: Mapping[str, Any]) -> list[str]:
    return [
        f"| {seen['recipe']} | {inline(each['claim'])} | {each['seen']} | "
        f"{_interval(each['difference'], each['claim'].split()[0])} |"
        for each in seen["predicted"]
    ]
