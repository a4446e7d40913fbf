"""What is installed, what is missing, and what this machine can do."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from limbeck import registry
from limbeck.errors import LimbeckError
from limbeck.faults import GIB, faults, this_machine, version


def examine() -> dict[str, Any]:
    """Versions, machine, extras, faults, data roots and free disk, as plain values."""
    return {
        "limbeck": metadata.version("limbeck"),
        "python": platform.python_version(),
        "packages": _packages(),
        "machine": _machine(),
        "extras": _extras(),
        "faults": [asdict(fault) for fault in faults(this_machine())],
        "data": _data(),
        "recipes": len(registry.names("recipes")),
    }


def text(found: dict[str, Any]) -> RenderableType:
    """``examine``'s findings for reading."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("limbeck", f"{found['limbeck']}, {found['recipes']} recipes, Python {found['python']}")
    table.add_row("packages", ", ".join(f"{k} {v or 'MISSING'}" for k, v in found["packages"].items()))
    for key, value in found["machine"].items():
        table.add_row(key.replace("_", " "), str(value))
    for key, value in found["data"].items():
        table.add_row(f"data {key}", value)
    extras = Table("extra", "state", title="extras", title_justify="left", box=None, pad_edge=False)
    for name, missing in found["extras"].items():
        state = "installed" if not missing else f"missing {', '.join(missing)}: pip install 'limbeck[{name}]'"
        extras.add_row(name, state)
    wrong = Table("found", "fix", title="faults", title_justify="left", box=None, pad_edge=False)
    for fault in found["faults"]:
        wrong.add_row(fault["what"], fault["fix"])
    return Group(table, "", extras, "", wrong if found["faults"] else "no faults found")


def _packages() -> dict[str, str | None]:
    """Version of each package that limbeck needs; None where it is missing."""
    return {name: version(name) for name, extra in _requirements() if extra is None}


def _extras() -> dict[str, list[str]]:
    """The missing packages of each extra."""
    extras: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra is not None:
            extras.setdefault(extra, []).extend([name] if version(name) is None else [])
    return extras


def _requirements() -> list[tuple[str, str | None]]:
    """(package, extra) of all that the installed metadata asks for; no extra = always needed."""
    lines = metadata.requires("limbeck") or []
    name = re.compile(r"[A-Za-z0-9._-]+")
    extra = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
    pairs = ((name.match(line), extra.search(line)) for line in lines)
    return [(n.group(), e.group(1) if e else None) for n, e in pairs if n]


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {"system": platform.platform(), "cores": cores}
    machine |= {"torch_threads": torch.get_num_threads(), "gpu": gpu}
    if sys.platform != "win32":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        machine["memory_gib"] = round(memory / GIB, 1)
    machine["disk_free_gib"] = round(shutil.disk_usage(Path.cwd()).free / GIB, 1)
    return machine


def _data() -> dict[str, Any]:
    from limbeck.data import roots

    try:
        folders = ", ".join(map(str, roots.roots(None)))
    except LimbeckError as error:
        folders = str(error)
    unset = f"none: set {roots.VARIABLE} to a folder, or the field data.root"
    return {"root": folders or unset, "sets": ", ".join(registry.names("data"))}
