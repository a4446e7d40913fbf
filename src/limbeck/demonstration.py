"""What a recipe was seen to do: seeds, spread, and the differences from its baselines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from limbeck import api, config, plain
from limbeck.config import Recipe
from limbeck.engine.ranks import alone
from limbeck.engine.state import read_json, write_json
from limbeck.errors import ConfigError, LimbeckError
from limbeck.report.compare import Comparison, Spread, compare
from limbeck.report.figures import lookup
from limbeck.report.seen import write_index

Item = TypeVar("Item")
Given = TypeVar("Given")
TEACHER = (
    "teacher.average_accuracy", "teacher.just_learned", "teacher.forgetting.cdl", "teacher.accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Demonstration:
    """What was seen, by recipe.

    Attributes:
        data: what was written, by recipe.
        files: the written files.
        comparison: all runs side by side.
    """

    data: dict[str, Any]
    files: tuple[Path, ...]
    comparison: Comparison

    @property
    def text(self) -> Comparison:
        """What a rich console prints."""
        return self.comparison


def demonstrate(
    names: Sequence[str],
    *,
    seeds: int = 3,
    sets: Sequence[str] = (),
    label: str = "",
    jobs: int = 1,
    runs: str | Path = "runs/demonstrations",
    out: str | Path = "demonstrations",
) -> Demonstration:
    """Run recipes and their baselines over seeds 0 .. ``seeds - 1``, and write down what was seen.

    A finished run of the same settings is taken as it is; one that was cut off is resumed.

    Args:
        names: recipes.
        seeds: at least 2: a spread needs two.
        sets: overrides for all of them, baselines too.
        label: added to the names of runs and files, to keep a changed setting apart.
        jobs: runs at a time; each takes the threads of its recipe.
        runs: folder of the runs.
        out: folder of ``<recipe><label>.json``.

    Raises:
        LimbeckError: as ``api.run``.
    """
    alone("limbeck demonstrate")
    if seeds < 2:
        raise ConfigError(f"seeds is {seeds}: a demonstration needs at least 2 for a spread")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: allowed are values of at least 1")
    if not names:
        raise ConfigError("there is nothing to demonstrate: name at least one recipe")
    suffix = f"-{label}" if label else ""
    plain.check_file_name(f"x{suffix}", "label")
    asked = {name: config.load(name, sets) for name in names}
    against = {name: [config.load(b, sets) for b in _baselines(name, r)] for name, r in asked.items()}
    every = {r.name: r for r in [*(b for each in against.values() for b in each), *asked.values()]}
    work = [
        (replace(recipe, seed=seed), Path(runs) / f"{name}{suffix}-s{seed}")
        for name, recipe in every.items()
        for seed in range(seeds)
    ]
    folders = _run_all(work, jobs)
    data, files = {}, []
    for given, recipe in asked.items():
        baselines = [b.name for b in against[given]]
        wanted = {recipe.name, *baselines}
        own = [folder for (r, _), folder in zip(work, folders, strict=True) if r.name in wanted]
        command = _command(given, seeds, sets, label)
        data[recipe.name] = seen(recipe, baselines, own) | {"command": command}
        path = Path(out) / f"{recipe.name}{suffix}.json"
        write_json(path, data[recipe.name])
        files.append(path)
    write_index(Path(out))
    first = next((b.name for each in against.values() for b in each), None)
    return Demonstration(data, tuple(files), compare(folders, baseline=first))


def _baselines(source: str, recipe: Recipe) -> list[str | Path]:
    """The recipe's baselines; a file is looked for beside the recipe's own."""
    here = Path(source).parent
    return [here / name if name.endswith(".yaml") else name for name in recipe.baselines]


def seen(recipe: Recipe, baselines: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """The figures of a recipe and its baselines, and their differences seed by seed."""
    together = [compare(folders, baseline=name) for name in baselines] or [compare(folders)]
    first = together[0].data
    own = next(label for label, m in first["methods"].items() if m["recipe"] == recipe.name)
    claimed = [side for claim in recipe.predicted for side in _sides(claim)]
    further = dict.fromkeys([*TEACHER, *(side for side in claimed if side not in baselines)])
    methods = {
        label: {
            "recipe": m["recipe"],
            "seeds": sorted(map(int, m["runs"])),
            "figures": further_figures(m["runs"], further) | m["figures"],
        }
        for label, m in first["methods"].items()
    }
    differences = {
        name: each.data["methods"][own]["differences"]
        for name, each in zip(baselines, together, strict=False)
    }
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "protocol": first["protocol"],
        "notes": first["notes"],
        "interval": "95 %, Student's t over seeds; differences are paired by seed",
        "methods": methods,
        "differences": differences,
        "predicted": [verdict(claim, own, methods, differences) for claim in recipe.predicted],
        "versions": api.versions(),
    }


def further_figures(runs: Mapping[str, str], paths: Iterable[str]) -> dict[str, Any]:
    """Figures at ``paths`` of the results over seeds, from the runs' folders by seed; those that all have."""
    results = {int(seed): read_json(Path(folder) / "result.json") for seed, folder in runs.items()}
    found = {}
    for path in paths:
        values = {seed: lookup(result, path) for seed, result in results.items()}
        if all(value is not None for value in values.values()):
            found[path] = Spread(values).as_dict()
    return found


def verdict(claim: str, own: str, methods: dict[str, Any], differences: dict[str, Any]) -> dict[str, Any]:
    """Whether a prediction was seen: ``figure > baseline``, ``<`` alike, or ``figure > other figure``.

    ``seen`` is yes or no where the 95 % interval of the paired difference leaves 0 out, else unclear.
    """
    figure, other = _sides(claim)
    if figure in differences.get(other, {}):
        spread = differences[other][figure]
    else:
        mine = methods[own]["figures"]
        by_recipe = {m["recipe"]: m["figures"] for m in methods.values()}
        there, name = (by_recipe[other], figure) if other in differences else (mine, other)
        spread = _difference(_figure(mine, figure, claim), _figure(there, name, claim))
    low, high = sorted(end if ">" in claim else -end for end in spread["interval"])
    answer = "yes" if low > 0 else "no" if high < 0 else "unclear"
    return {"claim": claim, "seen": answer, "difference": spread}


def _sides(claim: str) -> tuple[str, str]:
    figure, _, other = claim.partition("<" if "<" in claim else ">")
    return figure.strip(), other.strip()


def _figure(figures: Mapping[str, Any], name: str, claim: str) -> dict[str, Any]:
    if name not in figures:
        raise ConfigError(
            f"predicted has {claim!r}, but not all results have the figure {name!r}: name another"
        )
    found: dict[str, Any] = figures[name]
    return found


def _difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    values = {int(s): one["values"][s] - other["values"][s] for s in one["values"]}
    return Spread(values).as_dict()


def _command(name: str, seeds: int, sets: Sequence[str], label: str) -> str:
    words = ["limbeck", "demonstrate", name, "--seeds", str(seeds)]
    words += [word for item in sets for word in ("--set", item)]
    return shlex.join([*words, *(["--label", label] if label else [])])


def _run_all(work: Sequence[tuple[Recipe, Path]], jobs: int) -> list[Path]:
    return list(spread(run_one, work, jobs))


def spread(function: Callable[[Item], Given], work: Sequence[Item], jobs: int) -> Iterator[Given]:
    """``function`` of each item of ``work``, in order, in up to ``jobs`` processes.

    Raises:
        LimbeckError: ``function`` did, or one of the processes was killed.
    """
    if jobs == 1:
        yield from map(function, work)
        return
    futures: list[Future[Given]] = []
    told = 0
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=8) as pool:
            for item in work:
                running = [future for future in futures if not future.done()]
                if len(running) == jobs:  # none waits in the pool, which would begin it before it ends
                    wait(running, return_when=FIRST_COMPLETED)
                futures.append(pool.submit(function, item))
                while futures[told].done():
                    yield futures[told].result()
                    told += 1
            yield from (future.result() for future in futures[told:])
    except BrokenProcessPool as error:
        raise LimbeckError(
            "the process of a run was killed, often for lack of memory: give the same command again, maybe "
            "with fewer jobs; runs that finished are kept, those that were cut off go on"
        ) from error


def run_one(item: tuple[Recipe, Path]) -> Path:
    """Carry out a recipe in a folder; a run of the same settings that is there is resumed, or taken."""
    recipe, folder = item
    known = folder / "recipe.yaml"
    if known.exists() and config.fingerprint(config.load(known)) == config.fingerprint(recipe):
        api.resume(folder, quiet=True)
    else:
        api.run(recipe, out=folder, quiet=True)
    return folder
