"""All demonstrations of a folder as one table, written beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = {
    "student.average_accuracy": "A",
    "student.just_learned": "J",
    "student.forgetting.cdl": "F (cdl)",
    "teacher.average_accuracy": "A of the teacher",
    "fidelity.agreement": "agreement",
}
HEAD = """# What was seen

Written by `limbeck demonstrate` from the JSON files beside it; each of these names its command, protocol,
seeds and versions. Mean ± standard deviation over seeds, percent: A is the accuracy averaged over all tasks
after the last one, J the same right after each task was learnt, F (cdl) = J - A.
"""


def write_index(folder: Path) -> Path:
    """Write ``README.md`` in ``folder`` from its ``*.json`` demonstrations.

    Returns:
        The file.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    lines = [HEAD, "| recipe | seeds | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("| --- " * (len(COLUMNS) + 2) + "|")
    lines += [_row(each) for each in found]
    lines += ["", "## Against the baselines", "", "Differences paired by seed, with 95 % intervals.", ""]
    lines += ["| recipe | minus | A | J | F (cdl) |", "| --- | --- | --- | --- | --- |"]
    lines += [line for each in found for line in _differences(each)]
    lines += ["", "## What the papers lead one to expect", ""]
    lines += ["| recipe | prediction | seen | difference |", "| --- | --- | --- | --- |"]
    lines += [line for each in found for line in _predictions(each)]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _row(seen: Mapping[str, Any]) -> str:
    own = next(m for m in seen["methods"].values() if m["recipe"] == seen["recipe"])
    cells = [_spread(own["figures"].get(path)) for path in COLUMNS]
    return f"| {seen['recipe']} | {len(own['seeds'])} | " + " | ".join(cells) + " |"


def _spread(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:.1f} ± {figure['sd']:.1f}"


def _differences(seen: Mapping[str, Any]) -> list[str]:
    paths = list(COLUMNS)[:3]
    return [
        f"| {seen['recipe']} | {name} | " + " | ".join(_interval(found.get(path)) for path in paths) + " |"
        for name, found in seen["differences"].items()
    ]


def _interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    return f"{figure['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def _predictions(seen: Mapping[str, Any]) -> list[str]:
    return [
        f"| {seen['recipe']} | {each['claim']} | {each['seen']} | {_interval(each['difference'])} |"
        for each in seen["predicted"]
    ]
