"""What the faults are done to: a run of a second or two of every scenario, and of ``limbeck.distill``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.battery import test_scenarios
from tests.engine import small
from torch import nn

import limbeck
from limbeck import api, config, registry
from limbeck.engine.settings import Engine
from limbeck.engine.state import read_state
from limbeck.metrics import cost

Go = Callable[[Path, Path], Any]
"""Begin a run in a folder, or go on with it; what runs share lies in the second folder."""

OFTEN = ("engine.checkpoint_seconds=0", "engine.reuse_teachers=true")
MORE = {
    "continual": (*small.REPLAYED, "scenario.epochs=3", "scenario.batch_size=64"),
    "static": ("scenario.epochs=3",),
    "language": ("scenario.epochs=3",),
}
"""Overrides that let a scenario fill a cache, which it does not in a single epoch."""


def of_recipe(made: Callable[[Path], config.Recipe]) -> Go:
    """A run of the recipe that is made for a folder of caches."""

    def go(folder: Path, caches: Path) -> None:
        if (folder / "recipe.yaml").exists():
            api.resume(folder, quiet=True)
        else:
            api.run(made(caches), out=folder, quiet=True)

    return go


def plain_modules(folder: Path, caches: Path, **more: Any) -> Any:
    """``limbeck.distill``: one perceptron into another, on numbers."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 6, generator=draw)
    labels = inputs[:, :3].argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    engine = Engine(threads=1, checkpoint_seconds=0, cache_root=str(caches), log_every=2)
    given = {"train": (inputs, labels), "teacher": teacher, "student": student, "engine": engine} | more
    return limbeck.distill(
        **given, test=(inputs, labels), epochs=4, batch_size=16, out=folder, quiet=True,
        resume=(folder / "metrics.jsonl").exists(),
    )  # fmt: skip


def recipe(place: Path, name: str, caches: Path, *sets: str) -> config.Recipe:
    """The recipe of a scenario; its networks are written into ``place``."""
    shared = f"engine.cache_root={caches}"
    return test_scenarios.recipe(place, name, *OFTEN, shared, *MORE.get(name, ()), *sets)


def procedures(place: Path) -> dict[str, Go]:
    """All of them by name; their networks are written into ``place``."""

    def built(name: str, *sets: str) -> Go:
        return of_recipe(lambda caches: recipe(place, name, caches, *sets))

    every: dict[str, Go] = {name: built(name) for name in registry.names("scenarios")}
    joint = ("scenario.schedule=joint", "student.kd_prompts=null")
    return every | {"continual, joint": built("continual", *joint), "distill": plain_modules}


def ended(folder: Path) -> dict[str, Any]:
    """All that a finished run came to, without what time has a part in."""
    student = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "student").rglob("*"))
        if path.is_file() and path.name != "README.md"  # the card tells the time that the run took
    }
    return {"student": student, "figures": small.figures(folder), "log": small.lines(folder)}


def where_unlike(folder: Path, other: Path) -> str | None:
    """In what two finished runs differ; None where in nothing."""
    one, two = ended(folder), ended(other)
    for what, own in one.items():
        if own != two[what]:
            return what
    return None


def files(folder: Path) -> set[str]:
    """The files below a folder, but for checkpoints, whose numbers depend on when they were written."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] != "checkpoints"}


def left_behind(folder: Path, other: Path) -> list[str]:
    """Files of a finished run that ``other``, left alone, does not have, and checkpoints that are no pair."""
    kept = {path.name for path in (folder / "checkpoints").glob("*")} - {"facts.json"}
    halves = {name.partition(".")[0] for name in kept}
    whole = {f"{half}{kind}" for half in halves for kind in (".json", ".safetensors")}
    return sorted((files(folder) - files(other)) | (kept ^ whole))


def progress(folder: Path) -> tuple[int, int, int]:
    """Where the newest checkpoint stands, which must be a good one: stages done, epoch, batch."""
    stems = sorted(path.with_suffix("") for path in (folder / "checkpoints").glob("[0-9]*.json"))
    if not stems:
        return (0, 0, 0)
    state = read_state(stems[-1])
    return (len(state["done"]), state["epoch"], state["batch"])


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder in memory where there is one: a kill loses nothing that a disk has not yet been told."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def quick() -> None:
    """Leave out the timing of forward passes, which is no part of any fault."""
    torch.set_num_threads(1)
    os.environ.setdefault("LIMBECK_TRUST", "tests")  # a teacher's module is one of theirs
    cost.latency = lambda _: 0.0


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Write what a part of the faults found."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found | {"versions": api.versions()}, indent=1) + "\n")
