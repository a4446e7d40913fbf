"""Write docs/reliability.md from what the parts of ``make faults`` found.

    python -m tests.faults.page FOLDER PAGE

A part is a module of this folder that writes ``FOLDER/<its name>.json``: ``what`` was done, in words; whether
it ``holds``; the ``command``; the ``versions``; and a ``table``, a list of maps with the same keys. Where
there is no table, its numbers and words are one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HEAD = """# Reliability

What was done to the engine, and what came of it. Written by `make faults` from the JSON files in
`benchmarks/faults/`, never by hand; each names its command and versions.
"""
TITLES = {
    "kills": "Killed", "full": "No room", "flips": "Flipped bits", "poison": "Poisoned",
    "memory": "Memory", "fuzz": "Strangers' input", "ranks": "Several ranks",
}  # fmt: skip
ABOUT = ("what", "holds", "command", "versions", "table", "seed", "seconds")


def cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split()).replace("|", "\\|")


def rows(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The table of a part."""
    if found.get("table"):
        return list(found["table"])
    plain = {key: value for key, value in found.items() if key not in ABOUT}
    return [{"": key, "found": value} for key, value in plain.items() if isinstance(value, int | float | str)]


def part(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one part."""
    yield from (f"## {TITLES.get(name, name)}", "", cell(found.get("what", "")), "")
    table = rows(found)
    names = list(dict.fromkeys(key for row in table for key in row))
    if names:
        yield f"| {' | '.join(names)} |"
        yield f"|{' --- |' * len(names)}"
        for row in table:
            yield f"| {' | '.join(cell(row.get(key, '')) for key in names)} |"
        yield ""
    numbers = [key for key in names if any(type(row.get(key)) is int for row in table)]
    sums = ", ".join(f"{key}: {sum(row.get(key) or 0 for row in table)}" for key in numbers)
    if sums:
        yield from (f"In all: {sums}.", "")
    seen = {True: "It holds.", False: "**It does not hold.**"}.get(found.get("holds"), "")
    took = f" in {found['seconds']} s" if "seconds" in found else ""
    versions = ", ".join(f"{key} {value}" for key, value in (found.get("versions") or {}).items())
    yield from (f"{seen} `{found.get('command', '')}`{took}; {versions}.".strip(), "")


def page(folder: Path) -> str:
    """The whole page."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    order = [*(name for name in TITLES if name in found), *(name for name in found if name not in TITLES)]
    return "\n".join([HEAD, *(line for name in order for line in part(name, found[name]))])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    given.page.write_text(page(given.folder))


if __name__ == "__main__":
    main()
