"""The arena: one teacher, one student, one data set, one budget, and every method that fits."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from limbeck import api, config, plain
from limbeck.config import Recipe
from limbeck.contracts import Progress
from limbeck.demonstration import run_one, spread
from limbeck.engine.ranks import alone
from limbeck.engine.run import Run
from limbeck.engine.state import write_json
from limbeck.entrants import BASELINE, Entrant, Places, entrants, fitted, places
from limbeck.errors import ConfigError, Interrupted, LimbeckError
from limbeck.report import arena as page
from limbeck.report import figures
from limbeck.report.compare import Comparison, Method, compare
from limbeck.report.run import finished
from limbeck.scenarios.fit_together import has_teacher
from limbeck.scenarios.static import Desk, Static

INTERVAL = "95 %, Student's t over seeds; differences are paired by seed"


@dataclass(frozen=True)
class Arena:
    """What an arena found; prints itself on a rich console.

    Attributes:
        data: what was written: protocol, ranking, what was left out and why.
        file: the JSON file.
        page: the HTML page.
        comparison: all runs side by side.
    """

    data: dict[str, Any]
    file: Path
    page: Path
    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        accuracy = figures.ACCURACY
        yield f"{self.data['arena']}: {self.data['verdict']}"
        yield ""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for name in ("", "method", "accuracy, %", "95 % interval", f"minus {BASELINE}", "95 % interval"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for each in self.data["ranking"]:
            own, other = each["figures"][accuracy.path], each["differences"].get(accuracy.path)
            cells = [str(each["rank"]), each["method"], f"{own['mean']:.1f}", _interval(own)]
            cells += ["", ""] if other is None else [f"{other['mean']:+.1f}", _interval(other, "+")]
            table.add_row(*cells)
        yield table
        if self.data["left_out"]:
            yield ""
            yield from (f"left out: {each['method']}: {each['reason']}" for each in self.data["left_out"])
        yield ""
        yield f"page: {self.page}"


def _interval(spread: dict[str, Any], sign: str = "") -> str:
    low, high = spread["interval"]
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def arena(
    base: str = "kd-cnn",
    *,
    methods: Sequence[str] = (),
    seeds: int = 3,
    sets: Sequence[str] = (),
    label: str = "",
    jobs: int = 1,
    runs: str | Path = "runs/arenas",
    out: str | Path = "arenas",
    quiet: bool = False,
) -> Arena:
    """Let methods compete over seeds 0 .. ``seeds - 1``: one recipe gives teacher, student, data and budget.

    A finished run of the same settings is taken as it is; one that was cut off is resumed. A method whose dry
    run does not fit, or that fails in a run, is left out, with the reason.

    Args:
        base: a recipe of the scenario ``static`` with a teacher: its name or a YAML file.
        methods: objectives, or recipes whose objectives are taken; none = all objectives. The labels alone
            (``ce``) and ``kd`` always take part.
        seeds: at least 2: an interval needs two.
        sets: overrides for all of them.
        label: added to the name of the arena, to keep a changed setting apart.
        jobs: runs at a time; each takes the threads of its recipe.
        runs: folder of the runs.
        out: folder of ``<base><label>.json`` and ``.html``.
        quiet: say nothing of single runs.

    Raises:
        LimbeckError: a recipe that will not do, an unknown method, or fewer than two methods that fit.
    """
    alone("limbeck arena")
    recipe = _checked(config.load(base, sets), seeds, jobs)
    name = f"{recipe.name}-{label}" if label else recipe.name
    plain.check_file_name(name, "name and label")
    fit, left_out, steps = dry_runs(entrants(methods, recipe), recipe)
    work = [
        (one.recipe(recipe, seed), Path(runs) / name / f"{one.name}-{_settings(one, recipe)}-s{seed}")
        for one in fit
        for seed in range(seeds)
    ]
    failed = _run_all(work, jobs, quiet)
    left_out += [{"method": method, "reason": reason} for method, reason in failed.items()]
    kept = [one for one in fit if one.name not in failed]
    if BASELINE in failed or len(kept) < 2:
        raise ConfigError(f"nothing is left to compare: {'; '.join(failed.values())}")
    compared = compare([to for each, to in work if each.name not in failed], baseline=BASELINE)
    data = found(recipe, name, kept, compared, left_out) | {
        "budget": {"steps": steps} | {key: compared.protocol[key] for key in ("epochs", "batch")},
        "command": _command(base, methods, seeds, sets, label),
    }
    file = Path(out) / f"{name}.json"
    write_json(file, data)
    return Arena(data, file, page.write_arena(data, file.with_suffix(".html")), compared)


def _checked(recipe: Recipe, seeds: int, jobs: int) -> Recipe:
    if seeds < 2:
        raise ConfigError(f"seeds is {seeds}: an arena needs at least 2 for an interval")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: allowed are values of at least 1")
    if not isinstance(recipe.scenario, Static):
        raise ConfigError(f"recipe {recipe.name} is not of the scenario static: an arena needs one of these")
    if not has_teacher(recipe):
        raise ConfigError(f"recipe {recipe.name} has no teacher: name a recipe that has one, such as kd-cnn")
    return recipe


def _settings(one: Entrant, base: Recipe) -> str:
    """A mark of all that the method's runs ask for: changed settings go into other folders."""
    return config.fingerprint(one.recipe(base, base.seed))[:8]


# Dry runs


def dry_runs(asked: Sequence[Entrant], base: Recipe) -> tuple[list[Entrant], list[dict[str, str]], int]:
    """Those whose dry run fits, with their taps; the others with the reason; and the steps of a training."""
    fit: list[Entrant] = []
    left_out: list[dict[str, str]] = []
    known: tuple[Places, Places] | None = None
    steps = 0
    for one in sorted(asked, key=lambda one: one.name != BASELINE):
        try:
            if one.unfit:
                raise ConfigError(one.unfit)
            mine = one if known is None or one.alone else fitted(one, *known)
            here, steps = _dry_run(mine.recipe(base, base.seed))
            known = known or here
            fit.append(mine)
        except LimbeckError as error:
            if one.name == BASELINE:
                raise
            left_out.append({"method": one.name, "reason": str(error)})
    order = {one.name: place for place, one in enumerate(asked)}
    return sorted(fit, key=lambda one: order[one.name]), left_out, steps


def _dry_run(recipe: Recipe) -> tuple[tuple[Places, Places] | None, int]:
    """Build all of a run and ask for the terms of one batch.

    Returns:
        Where both networks can be tapped, None without a teacher; and the steps of a training.
    """
    plan = recipe.scenario
    assert isinstance(plan, Static)
    plan.check(recipe)
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(Path(folder), recipe.engine, recipe.seed, quiet=True) as run,
    ):
        desk = Desk(plan, recipe, run)
        pair = desk.pair
        taught = pair.teacher is not None
        pair.start("dry", desk.learning.index, desk.learning.labels)
        module = pair.distillation(None, pair.ask_live if taught else None)
        batch = next(iter(desk.learning.epoch(0))).to(run.device)
        steps = desk.learning.steps * plan.epochs
        with torch.random.fork_rng(devices=[]):
            module(batch, Progress(step=0, steps=steps, epoch=0, epochs=plan.epochs, task=0, tasks=1))
        if pair.teacher is None:
            return None, steps
        return (places(pair.student), places(pair.teacher)), steps


# Runs


def _run_all(work: Sequence[tuple[Recipe, Path]], jobs: int, quiet: bool) -> dict[str, str]:
    """Why methods failed, by method."""
    failed: dict[str, str] = {}
    for number, ((recipe, _), reason) in enumerate(zip(work, spread(_attempt, work, jobs), strict=True), 1):
        if reason is not None:
            failed.setdefault(recipe.name, f"seed {recipe.seed}: {reason}")
        if not quiet:
            said = "done" if reason is None else reason
            print(f"{number}/{len(work)} {recipe.name}, seed {recipe.seed}: {said}", file=sys.stderr)
    return failed


def _attempt(item: tuple[Recipe, Path]) -> str | None:
    """Why the run failed; None where it did not."""
    try:
        run_one(item)
    except Interrupted:
        raise
    except LimbeckError as error:
        return str(error)
    return None


# What was found


def found(
    base: Recipe, name: str, kept: Sequence[Entrant], compared: Comparison, left_out: list[dict[str, str]]
) -> dict[str, Any]:
    """The ranking, best first, and all that a reader must know of it."""
    entrant = {one.name: one for one in kept}
    methods = sorted(compared.methods, key=lambda m: -m.spreads[figures.ACCURACY.path].mean)
    ranking = [_row(rank, method, entrant[method.recipe]) for rank, method in enumerate(methods, 1)]
    asked = config.to_plain(base)
    result = finished(next(iter(_baseline(compared).runs.values())))
    return {
        "arena": name,
        "description": base.description,
        "verdict": verdict(ranking),
        "interval": INTERVAL,
        "baseline": BASELINE,
        "data": {
            "name": result["data"],
            "licence": result["data_licence"],
            "source": result["data_source"],
        },
        "networks": {who: asked[who] for who in ("teacher", "student")},
        "teacher_figures": _teacher(compared),
        "cost": result["cost"],
        "protocol": result["protocol"],
        "notes": [note for note in compared.notes if not note.startswith("protocol: teacher is")],
        "seeds": sorted(compared.methods[0].runs),
        "figures": compared.data["figures"],
        "ranking": ranking,
        "left_out": left_out,
        "versions": api.versions(),
    }


def _row(rank: int, method: Method, one: Entrant) -> dict[str, Any]:
    seconds = [float(figures.lookup(finished(run), "time.stages.train")) for run in method.runs.values()]
    return {
        "rank": rank,
        "method": one.name,
        "description": one.description,
        "origin": one.origin,
        "added_up": one.told(),
        "objective": config.plain_value(one.objective, "objective"),
        "seconds": sum(seconds) / len(seconds),
        "figures": {path: spread.as_dict() for path, spread in method.spreads.items()},
        "differences": {path: spread.as_dict() for path, spread in method.differences.items()},
    }


def _teacher(compared: Comparison) -> dict[str, Any]:
    """The teacher's accuracy by seed: the same for all methods."""
    path, runs = figures.of_teacher(figures.ACCURACY).path, _baseline(compared).runs
    return {str(seed): figures.lookup(finished(run), path) for seed, run in sorted(runs.items())}


def _baseline(compared: Comparison) -> Method:
    return next(method for method in compared.methods if method.label == compared.baseline)


def verdict(ranking: Sequence[dict[str, Any]]) -> str:
    """How many methods are told apart from the baseline by the interval of the paired difference."""
    ends = [
        each["differences"][figures.ACCURACY.path]["interval"]
        for each in ranking
        if figures.ACCURACY.path in each["differences"]
    ]
    above, below = sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)
    return (
        f"of {len(ends)} methods set against {BASELINE}, {above} came out above it, {below} below, and "
        f"{len(ends) - above - below} cannot be told from it, each at 95 % by itself"
    )


def _command(base: str, methods: Sequence[str], seeds: int, sets: Sequence[str], label: str) -> str:
    words = ["limbeck", "arena", base, "--seeds", str(seeds)]
    words += [word for name in methods for word in ("--methods", name)]
    words += [word for item in sets for word in ("--set", item)]
    return shlex.join([*words, *(["--label", label] if label else [])])
