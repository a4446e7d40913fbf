"""Runs side by side: mean and spread over seeds, and differences from a baseline at equal seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from scipy import stats

from limbeck.errors import ConfigError, unknown
from limbeck.report import figures
from limbeck.report.figures import Figure
from limbeck.report.run import Run, finished, read_run, understood

CONFIDENCE = 0.95
# Runs that differ in one of these answer different questions; other parts of the protocol are only noted.
SAME_QUESTION = (
    "tasks",
    "sizes",
    "replay",
    "evaluated",
    "forgetting_definitions",
    "vocabulary",
    "test_tokens",
)
# What may differ between two seeds of one method, or changes no figure.
NO_METHOD = {"seed", "name", "description", "versions", "baselines", "predicted"}
MACHINE = {"engine.precision", "engine.compile", "engine.cache_dtype"}


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        values: the figure by seed.
    """

    values: Mapping[int, float]

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.values.values())))

    @cached_property
    def sd(self) -> float | None:
        """The standard deviation over seeds, with n - 1; None for one seed."""
        return float(np.std(list(self.values.values()), ddof=1)) if self.n > 1 else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t, with n - 1 degrees of freedom; None for one seed."""
        if self.sd is None:
            return None
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, self.n - 1)) * self.sd / self.n**0.5
        return self.mean - half, self.mean + half

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "mean": self.mean,
            "sd": self.sd,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "values": {str(seed): value for seed, value in sorted(self.values.items())},
        }


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: the recipe's name, with what differs where another method has the same name.
        recipe: the recipe's name.
        runs: the run of each seed.
        spreads: each figure over the seeds, by its path.
        differences: each figure minus the baseline's at equal seeds, by its path; empty without one.
    """

    label: str
    recipe: str
    runs: Mapping[int, Run]
    spreads: Mapping[str, Spread]
    differences: Mapping[str, Spread]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; prints itself on a rich console.

    Attributes:
        methods: in the order first named.
        figures: what is compared.
        baseline: the label of the method that the others are set against; None = none.
        protocol: what all runs share.
        notes: what a reader must know before comparing.
    """

    methods: tuple[Method, ...]
    figures: tuple[Figure, ...]
    baseline: str | None
    protocol: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "confidence": CONFIDENCE,
            "interval": "Student's t over seeds",
            "protocol": dict(self.protocol),
            "notes": list(self.notes),
            "baseline": self.baseline,
            "figures": {
                f.path: {"label": f.label, "unit": f.unit, "meaning": f.meaning} for f in self.figures
            },
            "methods": {
                method.label: {
                    "recipe": method.recipe,
                    "runs": {str(seed): str(run.folder) for seed, run in sorted(method.runs.items())},
                    "figures": {path: spread.as_dict() for path, spread in method.spreads.items()},
                    "differences": {path: spread.as_dict() for path, spread in method.differences.items()},
                }
                for method in self.methods
            },
        }

    @property
    def text(self) -> Comparison:
        """What a rich console prints: this."""
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from limbeck.report.table import render

        yield from render(self, ascii_only=options.ascii_only)

    def plot(self, path: str | Path) -> Path:
        """Draw a point for each seed, the mean and its interval.

        Args:
            path: a ``.png``, ``.svg`` or ``.pdf`` file.

        Raises:
            ConfigError: another kind of file.
        """
        from limbeck.report.plot import draw

        return draw(self, Path(path))


@understood("one of the runs")
def compare(
    run_dirs: Iterable[str | Path], *, baseline: str | None = None, mixed: bool = False
) -> Comparison:
    """Set finished runs side by side.

    Runs whose configuration is equal but for the seed are one method.

    Args:
        run_dirs: the runs' folders.
        baseline: the method that others are set against, seed by seed: its label or its recipe's name.
        mixed: allow runs on different data or of different streams; the comparison then says so.

    Raises:
        DataError: a folder is no run's, or its run has not finished.
        ConfigError: no runs; one seed twice; an unknown baseline; other data or streams without ``mixed``.
    """
    runs = [read_run(folder) for folder in run_dirs]
    if not runs:
        raise ConfigError("there is nothing to compare: name the folders of at least one finished run")
    results = {id(run): finished(run) for run in runs}
    groups = _group(runs)
    labels = _labels(groups)
    notes = _unlike(groups, labels, mixed) + _seed_notes(groups, labels)
    chosen = None if baseline is None else _baseline(baseline, labels, groups)
    shown = _shown(list(results.values()))
    spreads = [_spreads(group, shown) for group in groups]
    base = None if chosen is None else spreads[labels.index(chosen)]
    methods = tuple(
        Method(
            label,
            group[0].name,
            {_seed(run): run for run in group},
            own,
            {} if base is None or label == chosen else _differences(own, base),
        )
        for label, group, own in zip(labels, groups, spreads, strict=True)
    )
    return Comparison(methods, shown, chosen, _shared_protocol(runs), tuple(notes))


def _seed(run: Run) -> int:
    return int(finished(run)["seed"])


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Every scalar of nested maps and lists by its dotted path."""
    if isinstance(tree, Mapping) and tree:
        parts: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list) and tree:
        parts = enumerate(tree)
    else:
        return {path: tree}
    found: dict[str, Any] = {}
    for name, part in parts:
        found |= _flat(part, f"{path}.{name}" if path else str(name))
    return found


def _method_fields(run: Run) -> dict[str, Any]:
    """The configuration that makes the method: all but the seed, the words and the machine."""
    fields = _flat({name: value for name, value in run.recipe.items() if name not in NO_METHOD})
    return {p: v for p, v in fields.items() if not p.startswith("engine.") or p in MACHINE}


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.name, _method_fields(run)], sort_keys=True, default=str)
        for other in groups.setdefault(key, []):
            if _seed(other) == _seed(run):
                raise ConfigError(
                    f"seed {_seed(run)} of {run.name} occurs twice, in {other.folder} and {run.folder}: "
                    "leave one out"
                )
        groups[key].append(run)
    return list(groups.values())


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The recipe's name, and what differs from others of the same name."""
    labels = []
    for group in groups:
        name = group[0].name
        alike = [_method_fields(other[0]) for other in groups if other[0].name == name]
        own = _method_fields(group[0])
        differing = sorted(
            path
            for path in set().union(*alike)
            if any(other.get(path) != own.get(path) or (path in other) != (path in own) for other in alike)
        )
        told = ", ".join(f"{path}={own.get(path, 'absent')}" for path in differing)
        labels.append(f"{name} ({told})" if told else name)
    return labels


def _question(run: Run) -> dict[str, Any]:
    """What the run was about: the data and the stream."""
    result = finished(run)
    protocol = result.get("protocol") or {}
    about = {"scenario": result.get("scenario"), "data": result.get("data")}
    about |= {p: v for p, v in _flat({"data": run.recipe.get("data")}).items() if p != "data"}
    return about | {name: protocol[name] for name in SAME_QUESTION if name in protocol}


def _unlike(groups: Sequence[Sequence[Run]], labels: Sequence[str], mixed: bool) -> list[str]:
    """Notes on what differs in the protocol.

    Raises:
        ConfigError: the question differs and ``mixed`` is not set.
    """
    first, notes = groups[0][0], []
    for label, group in zip(labels, groups, strict=True):
        for run in group:
            notes += _different_question(first, labels[0], run, label)
    orders: dict[int, tuple[str, Any]] = {}
    for label, group in zip(labels, groups, strict=True):
        for run in group:
            order = figures.lookup(finished(run), "protocol.class_order")
            seen = orders.setdefault(_seed(run), (label, order))
            if seen[1] != order:
                notes.append(f"class order at seed {_seed(run)}: {label} and {seen[0]} differ")
    if notes and not mixed:
        raise ConfigError(
            f"the runs do not answer the same question: {notes[0]}: leave some out, or allow it with mixed"
        )
    others = [
        _protocol_note(first, labels[0], group[0], label) for label, group in zip(labels, groups, strict=True)
    ]
    return [f"NOT THE SAME QUESTION: {note}" for note in dict.fromkeys(notes)] + [
        n for o in others for n in o
    ]


def _different_question(first: Run, first_label: str, run: Run, label: str) -> list[str]:
    one, other = _question(first), _question(run)
    return [
        f"{name} is {_short(one.get(name))} in {first_label} and {_short(other.get(name))} in {label}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def _protocol_note(first: Run, first_label: str, run: Run, label: str) -> list[str]:
    one, other = (finished(r).get("protocol") or {} for r in (first, run))
    return [
        f"protocol: {name} is {_short(one.get(name))} in {first_label}, {_short(other.get(name))} in {label}"
        for name in dict.fromkeys([*one, *other])
        if name not in (*SAME_QUESTION, "class_order") and one.get(name) != other.get(name)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."


def _seed_notes(groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> list[str]:
    """A note where methods were not run over the same seeds."""
    seeds = [sorted(_seed(run) for run in group) for group in groups]
    if all(each == seeds[0] for each in seeds):
        return []
    told = "; ".join(
        f"{label}: {', '.join(map(str, each))}" for label, each in zip(labels, seeds, strict=True)
    )
    return [f"the seeds differ: {told}"]


def _baseline(name: str, labels: Sequence[str], groups: Sequence[Sequence[Run]]) -> str:
    if name in labels:
        return name
    named = [label for label, group in zip(labels, groups, strict=True) if group[0].name == name]
    if len(named) == 1:
        return named[0]
    raise unknown("baseline", name, labels)


def _shown(results: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """Every figure that some run has, in the order of the house."""
    found = {f.path: f for result in results for f in figures.figures_of(result)}
    found |= {f.path: f for result in results for f in figures.nested_figures(result)}
    order = [f.path for f in figures.figures_of(max(results, key=lambda r: len(figures.figures_of(r))))]
    return tuple(found[path] for path in [*order, *(p for p in found if p not in order)])


def _spreads(group: Sequence[Run], shown: Sequence[Figure]) -> dict[str, Spread]:
    spreads = {}
    for figure in shown:
        values = {_seed(run): figure.of(finished(run)) for run in group}
        known = {seed: value for seed, value in values.items() if value is not None}
        if known:
            spreads[figure.path] = Spread(known)
    return spreads


def _differences(own: Mapping[str, Spread], base: Mapping[str, Spread]) -> dict[str, Spread]:
    """Seed by seed, this method minus the baseline, where both have the figure."""
    found = {}
    for path, spread in own.items():
        if path.startswith("cost.") or path not in base:
            continue
        common = spread.values.keys() & base[path].values.keys()
        if common:
            found[path] = Spread({seed: spread.values[seed] - base[path].values[seed] for seed in common})
    return found


def _shared_protocol(runs: Sequence[Run]) -> dict[str, Any]:
    """The parts of the protocol, and the data, that every run has in common."""
    all_of = [{"data": finished(run).get("data"), **(finished(run).get("protocol") or {})} for run in runs]
    return {name: value for name, value in all_of[0].items() if all(p.get(name) == value for p in all_of)}
