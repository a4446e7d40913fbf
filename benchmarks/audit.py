"""Every package that limbeck needs: version, licence, and which extra asks for it.

``python benchmarks/audit.py --out docs/dependencies.md`` writes the page from installed metadata.
"""

from __future__ import annotations

import argparse
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|EUPL|CDDL|OSL)\b|General Public|Mozilla Public", re.IGNORECASE)
ALWAYS = "always"
HEAD = """# Dependencies and their licences

Written by `python benchmarks/audit.py --out docs/dependencies.md` from the metadata of the packages that are
installed where it ran, on Linux; versions are those. "Needed by" is the extra that asks for a package,
directly or through others. Flagged are licences with conditions on those who pass the package on (copyleft
of any strength), and those that the metadata does not name: read these before you ship them. limbeck passes
none of these packages on.

Known vulnerabilities are not in this page: they change daily. `pip-audit -r requirements.lock --no-deps` asks
the advisory database of the Python Package Index, which needs the network. {audited}
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--audited", default="It was not run for this page.", help="what pip-audit said")
    asked = parser.parse_args()
    needed = needs("limbeck")
    rows = [row(name, extras) for name, extras in sorted(needed.items())]
    missing = sorted(name for name in needed if version(name) is None)
    lines = [HEAD.format(audited=asked.audited), f"{len(rows) - len(missing)} packages.", ""]
    lines += ["| package | version | licence | needed by | flag |", "| --- | --- | --- | --- | --- |"]
    lines += [line for name, line in zip(sorted(needed), rows, strict=True) if name not in missing]
    if missing:
        lines += ["", f"Not installed where this ran, so not looked at: {', '.join(missing)}."]
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def needs(root: str) -> dict[str, set[str]]:
    """Each package that ``root`` leads to, with the extras of ``root`` that it takes."""
    found: dict[str, set[str]] = {}
    for text in metadata.requires(root) or []:
        wanted = Requirement(text)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(wanted.marker or ""))
        follow(wanted, extra.group(1) if extra else ALWAYS, found)
    return found


def follow(wanted: Requirement, extra: str, found: dict[str, set[str]]) -> None:
    """Add a package and all that it asks for."""
    name = canonicalize_name(wanted.name)
    if extra in found.setdefault(name, set()):
        return
    found[name].add(extra)
    if version(name) is None:
        return
    for text in metadata.requires(name) or []:
        inner = Requirement(text)
        given = [{"extra": chosen} for chosen in (wanted.extras or {""})]
        if inner.marker is None or any(inner.marker.evaluate(each) for each in given):
            follow(inner, extra, found)


def version(name: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def row(name: str, extras: set[str]) -> str:
    """A line of the table."""
    told = licence(name)
    flag = "not named" if not told else "copyleft" if COPYLEFT.search(told) else ""
    where = ALWAYS if ALWAYS in extras else ", ".join(sorted(extras))
    return f"| {name} | {version(name) or '-'} | {told.replace('|', '/') or '-'} | {where} | {flag} |"


def licence(name: str) -> str:
    """What the metadata says: the expression, else the classifiers, else the first line of the field."""
    if version(name) is None:
        return ""
    about = metadata.metadata(name)
    if about["License-Expression"]:
        return str(about["License-Expression"])
    classes = [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if "License ::" in line
    ]
    named = str(about["License"] or "").strip().splitlines()
    return " and ".join(classes) or (named[0][:60] if named and named[0] != "UNKNOWN" else "")


if __name__ == "__main__":
    main()
