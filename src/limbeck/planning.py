"""What a run will take, before anything is spent: steps, memory, caches and time, from a short probe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck import config
from limbeck.api import chosen, finish, folder_of
from limbeck.config import Recipe
from limbeck.engine.probe import Part, Probe
from limbeck.engine.ranks import alone, together
from limbeck.engine.settings import Engine
from limbeck.engine.shared import cache_root
from limbeck.engine.state import write_text
from limbeck.errors import Interrupted
from limbeck.report import figures

ROLES = ("student", "teacher")


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take.

    Attributes:
        data: plain data: ``seconds`` of the run as its ``result.json`` counts them, ``memory_bytes`` resident
            at most, ``cache_bytes`` on disk, ``stages`` with their steps, ``parameters``, and more.
    """

    data: dict[str, Any]

    @property
    def text(self) -> RenderableType:
        """The same for a console."""
        return Group(*_lines(self.data))


@together()
def plan(
    recipe: str | Path | Recipe,
    sets: Sequence[str] = (),
    *,
    seed: int | None = None,
    out: str | Path | None = None,
) -> Plan:
    """Foresee what ``limbeck.run`` with the same arguments will take.

    The scenario is carried out in a temporary folder, on the real data with the real networks, but a stage
    stops after some steps, a test pass after some batches, and caches are asked for some samples. Nothing
    stays behind: caches and teachers that earlier runs left are read, not written.

    Raises:
        LimbeckError: as ``limbeck.run`` would before training; or it is asked of several ranks, each of which
            would stop its stages at another step.
    """
    alone("limbeck plan")
    recipe = chosen(recipe, sets, seed)
    engine: Engine = recipe.engine
    recipe.scenario.check(recipe)
    began = time.perf_counter()
    with TemporaryDirectory(prefix="limbeck-plan-") as place, engine.limited():
        root = cache_root(folder_of(recipe, out), engine)
        settings = replace(engine, cache_root=str(root), track=())
        try:
            probe = Probe(Path(place) / "run", settings, recipe.seed)
            with probe:
                write_text(probe.folder / "recipe.yaml", config.dump(recipe))
                result = finish(probe.folder, probe, recipe.scenario.run(recipe, probe), recipe)
        except Interrupted as error:
            raise Interrupted("stopped while planning; nothing was kept") from error
        return Plan(forecast(recipe, probe, result.data) | {"probe_seconds": time.perf_counter() - began})


def forecast(recipe: Recipe, probe: Probe, result: dict[str, Any]) -> dict[str, Any]:
    """What follows from a probe that came to its end."""
    cuda = probe.device.type == "cuda"
    size, _ = probe.checkpoint
    return {
        "recipe": recipe.name, "scenario": result["scenario"], "seed": recipe.seed, "data": result["data"],
        "device": str(probe.device), "threads": torch.get_num_threads(), "shard": recipe.engine.shard,
        "seconds": result["time"]["seconds"] + probe.seconds_ahead(),
        "memory_bytes": probe.memory(),
        "device_memory_bytes": torch.cuda.max_memory_allocated(probe.device) if cuda else None,
        "cache_bytes": {
            "run": max((part.bytes for part in probe.captures if not part.shared), default=0),
            "shared": sum(part.bytes for part in probe.captures if part.shared),
        },
        "checkpoint_bytes": size * recipe.engine.keep_checkpoints,
        "parameters": {
            who: parameters(probe, who) for who in ROLES if hasattr(probe.modules, who)
        },
        "stages": [_described(part) for part in probe.stages],
        "passes": _summed(probe.passes),
        "captures": _summed(probe.captures),
        "in_full_seconds": in_full(probe, result),
    }  # fmt: skip


def parameters(probe: Probe, who: str) -> dict[str, int]:
    """How many numbers of a network learn in this run, and how many stand still."""
    own = {id(p): p for p in probe.modules.get_submodule(who).parameters()}
    learning = sum(p.numel() for name, p in own.items() if name in probe.learning)
    return {"learning": learning, "frozen": sum(p.numel() for p in own.values()) - learning}


def in_full(probe: Probe, result: dict[str, Any]) -> float:
    """Seconds of what the probe did in full: all but stages, passes and captures."""
    parts = [*probe.stages, *probe.passes, *probe.captures]
    taken = sum(part.seconds - part.ahead for part in parts if not part.there)
    return max(0.0, float(result["time"]["seconds"]) - probe.vain - taken)


def _described(part: Part) -> dict[str, Any]:
    return asdict(part) | {"seconds": part.seconds}


def _summed(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts of one name together."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for part in parts:
        told = found.setdefault((part.name, part.there), {"name": part.name, "times": 0, "there": part.there})
        told["times"] += 1
        for name in ("count", "seen", "seconds", "bytes"):
            told[name] = told.get(name, 0) + getattr(part, name)
    return list(found.values())


def _lines(data: dict[str, Any]) -> Iterator[RenderableType]:
    stages = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("stage", "steps", "ms a step", "time"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for stage in data["stages"]:
        told = (str(stage["count"]), f"{1000 * stage['each']:.3g}", figures.duration(stage["seconds"]))
        stages.add_row(stage["name"], *(("", "", "taken over") if stage["there"] else told))
    yield from (Text(f"{data['recipe']}, {data['scenario']} on {data['data']}", style="bold"), Text())
    yield from (stages, Text())
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in _facts(data):
        grid.add_row(*row)
    yield grid


def _facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part in data["passes"]:
        yield part["name"], f"{part['count']} batches, {figures.duration(part['seconds'])}"
    for part in data["captures"]:
        what = "is there" if part["there"] else figures.duration(part["seconds"])
        yield f"cache of {part['name']}", f"{part['count']} rows, {_bytes(part['bytes'])}, {what}"
    yield "all else", f"{figures.duration(data['in_full_seconds'])}, done in full to see it"
    for who, count in data["parameters"].items():
        told = " and ".join(f"{figures.count(count[name])} {name}" for name in ("learning", "frozen"))
        yield f"parameters, {who}", told
    yield "memory", f"{_bytes(data['memory_bytes'])} resident at most, with the whole batch on one rank"
    if data["device_memory_bytes"] is not None:
        yield "memory of the device", f"{_bytes(data['device_memory_bytes'])} at most"
    if data["shard"] != "none":
        yield "shared out", f"{data['shard']}, on several ranks: this is of one, which keeps all and caches"
    own, shared = data["cache_bytes"]["run"], data["cache_bytes"]["shared"]
    yield "checkpoints", _bytes(data["checkpoint_bytes"])
    yield "caches", f"{_bytes(own)} while it runs, {_bytes(shared)} that stay for other runs"
    yield "time", f"{figures.duration(data['seconds'])}; this took {figures.duration(data['probe_seconds'])}"


def _bytes(count: float) -> str:
    return f"{figures.count(count)}B"
