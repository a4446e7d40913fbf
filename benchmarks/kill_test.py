"""Kill a run at random moments, resume it, and compare what it ends with to the run that was left alone.

    python benchmarks/kill_test.py

Each attempt is a process of its own that gets SIGKILL after a random time. A run that was resumed may be
killed again, until it ends. What is compared is the file of the student's weights, byte for byte, the
figures and the log. Writes ``benchmarks/kill_test.json``: the place of each kill.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.engine import small

from limbeck import api
from limbeck.engine import cache, run

FORK = multiprocessing.get_context("fork")
PROCEDURES: dict[str, tuple[str, ...]] = {
    "kdp, replayed views": ("scenario.epochs=6", "views.count=3", "views.translate=0.1"),
    "kdp, fresh views": ("scenario.epochs=6", *small.FRESH),
    "prompt mapping, joint": ("scenario.epochs=10", *small.JOINT),
}
TRIES = 60


def say(place: Any, text: str) -> None:
    place.value = text.encode()


def told(owner: Any, name: str, text: Callable[..., str], place: Any) -> None:
    """While ``owner.name`` runs, ``place`` holds what ``text`` makes of its arguments."""
    true = getattr(owner, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        before = place.value
        say(place, text(*arguments, before=before.decode()))
        found = true(*arguments, **named)
        say(place, before.decode())
        return found

    setattr(owner, name, watched)


def attempt(recipe: Any, folder: Path, place: Any) -> None:
    """Start the run, or go on with it, and tell where it stands."""
    torch.set_num_threads(1)
    say(place, "start")
    enter = run.Run.enter

    def entered(at: run.Run, stage: str, turns: Any) -> Any:
        found = enter(at, stage, turns)
        if found is not None:
            say(place, stage)
        return found

    leave = run.Run.leave

    def left(at: run.Run, stage: str, turns: Any) -> None:
        leave(at, stage, turns)
        say(place, "between stages")

    run.Run.enter, run.Run.leave = entered, left  # type: ignore[method-assign]
    told(run.Run, "once", lambda _, name, __, before: name, place)
    told(run, "write_state", lambda *_, before: f"{before}: writing a checkpoint", place)
    told(cache.Cache, "fill", lambda *_, before: f"{before}: filling a cache", place)
    told(api, "finish", lambda *_, before: "writing the results", place)
    if (folder / "recipe.yaml").exists():
        api.resume(folder, quiet=True)
    else:
        api.run(recipe, out=folder, quiet=True)


def spawn(recipe: Any, folder: Path) -> tuple[Any, Any]:
    place = FORK.RawArray("c", 200)  # without a lock, which a killed process would keep
    process = FORK.Process(target=attempt, args=(recipe, folder, place))
    process.start()
    return process, place


def whole(recipe: Any, folder: Path) -> float:
    """The run that is left alone; the seconds that it takes."""
    began = time.monotonic()
    process, _ = spawn(recipe, folder)
    process.join()
    assert process.exitcode == 0, f"the run of {folder} failed"
    return time.monotonic() - began


def killed(recipe: Any, folder: Path, wait: Callable[[], float], most: int) -> list[str]:
    """Run to the end with up to ``most`` kills; where they came."""
    places: list[str] = []
    for _ in range(TRIES):
        process, place = spawn(recipe, folder)
        if len(places) < most:
            process.join(wait())
        else:
            process.join()
        if process.exitcode == 0:
            return places
        if process.exitcode is not None:
            raise SystemExit(f"an attempt at {folder} failed with exit code {process.exitcode}")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        places.append(place.value.decode())
    raise SystemExit(f"{folder} did not end within {TRIES} attempts")


def trial(root: Path, name: str, kills: int, chance: random.Random) -> list[dict[str, Any]]:
    """Resumed runs of one procedure until ``kills`` kills have come; each compared with the whole one."""
    runs: list[dict[str, Any]] = []

    def recipe(caches: str) -> Any:
        where = f"engine.cache_root={root / caches}"
        return small.recipe(root, *PROCEDURES[name], where, "engine.checkpoint_seconds=0.05")

    untouched = root / f"{name}, whole"
    seconds = whole(recipe("caches of the whole"), untouched)
    came = 0
    while came < kills:
        folder = root / f"{name}, {len(runs)}"
        wait = partial(chance.uniform, 0.02 * seconds, 0.9 * seconds)
        places = killed(recipe(f"caches {len(runs)}"), folder, wait, kills - came)
        came += len(places)
        small.assert_same(folder, untouched)
        runs.append({"procedure": name, "killed_in": places, "equal": True})
        shutil.rmtree(folder)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="of each procedure")
    parser.add_argument("--only", choices=PROCEDURES, help="one procedure; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else PROCEDURES:
            runs += trial(Path(folder), name, options.kills, chance)
    places = [place for each in runs for place in each["killed_in"]]
    result = {
        "what": "runs killed by SIGKILL at random moments and resumed, possibly killed again",
        "compared": "bytes of the student's weights, all figures but times, all log lines but times",
        "kills": len(places),
        "resumed_runs": len(runs),
        "all_equal": all(each["equal"] for each in runs),
        "kills_by_place": dict(sorted(Counter(places).items())),
        "runs": runs,
        "versions": api.versions(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("kills", "resumed_runs", "all_equal", "kills_by_place")}))


if __name__ == "__main__":
    main()
