"""Kill runs, resume them, and compare what they end with to the run that was left alone.

    python -m tests.faults.kills --out FOLDER

Every attempt is a process of its own. It gets SIGKILL at a named place, or after a random time; the resumed
run may be killed again. What is compared: the bytes of the student's files, all figures but times, all lines
of the log but times, and which files are left. After each kill the newest checkpoint must be a good one, and
no older than before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import procedures
from tests.faults.places import PLACES, Places
from tests.faults.procedures import Go

FORK = multiprocessing.get_context("fork")
CLOCK = "by the clock"
TRIES = 12


class Deadly(Places):
    """Kills its process where a place is passed for the ``turn``-th time."""

    def __init__(self, place: str, turn: int) -> None:
        super().__init__(self.kill)
        self.place, self.turn = place, turn

    def comes(self, place: str) -> bool:
        return place == self.place and self.passed[place] == self.turn

    def kill(self, place: str, turn: int) -> None:
        if self.comes(place):
            os.kill(os.getpid(), signal.SIGKILL)


def alone(go: Go, folder: Path, caches: Path, counts: Any) -> None:
    """The run that is left alone; how often it passed each place goes into ``counts``."""
    procedures.quick()
    places = Places(lambda place, turn: None)
    places.patch()
    go(folder, caches)
    counts[:] = [places.passed[place] for place in PLACES]


def attempt(go: Go, folder: Path, caches: Path, place: str, turn: int) -> None:
    """Begin the run, or go on with it; die at ``place``."""
    procedures.quick()
    Deadly(place, turn).patch()
    go(folder, caches)


def untouched(go: Go, folder: Path, caches: Path) -> tuple[float, dict[str, int]]:
    """Seconds that the run takes when it is left alone, and how often it passes each place."""
    go(folder, caches)  # here, so that what it imports is there in each attempt
    shutil.rmtree(folder)
    shutil.rmtree(caches, ignore_errors=True)
    began, counts = time.monotonic(), FORK.Array("i", len(PLACES))
    process = FORK.Process(target=alone, args=(go, folder, caches, counts))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the run of {folder} failed")
    return time.monotonic() - began, dict(zip(PLACES, counts, strict=True))


def killed(go: Go, folder: Path, caches: Path, ends: list[tuple[str, int, float]]) -> list[str]:
    """Run to the end, with a kill in each attempt that lives to meet its own; where they came.

    Args:
        ends: place, turn and, by the clock, seconds, of one attempt after another.
    """
    came: list[str] = []
    stood = (0, 0, 0)
    for place, turn, seconds in [*ends, ("", 0, 0.0)]:
        process = FORK.Process(target=attempt, args=(go, folder, caches, place, turn))
        process.start()
        process.join(seconds if place == CLOCK else None)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        if process.exitcode == 0:
            continue
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"an attempt at {folder} failed, {process.exitcode}, after kills at {came}")
        came.append(place)
        stands = procedures.progress(folder)
        if stands < stood:
            raise SystemExit(f"{folder} lost a checkpoint: it stood at {stood} and stands at {stands}")
        stood = stands
    return came


def trial(
    root: Path, name: str, go: Go, chance: random.Random, clock: int, most: int
) -> list[dict[str, Any]]:
    """Kills of one procedure: at each place that it passes, and ``clock`` times by the clock."""
    whole, own = root / f"{name} whole" / "run", root / f"{name} whole" / "caches"
    seconds, passes = untouched(go, whole, own)
    wanted = [(place, chance.randint(1, count), 0.0) for place, count in passes.items() if count]
    wanted += [(CLOCK, 0, chance.uniform(0.02, 0.9) * seconds) for _ in range(clock)]
    chance.shuffle(wanted)
    found = []
    for number, end in enumerate(wanted[:most]):
        folder, caches = root / f"{name} {number}" / "run", root / f"{name} {number}" / "caches"
        again = (CLOCK, 0, chance.uniform(0.02, 0.9) * seconds)
        came = killed(go, folder, caches, [end, again] if number % 3 == 0 else [end])
        left = procedures.left_behind(folder, whole) + sorted(
            procedures.files(caches) - procedures.files(own) if caches.exists() else ()
        )
        unlike = procedures.where_unlike(folder, whole)
        found.append({"run": name, "killed": came, "unlike": unlike, "left": left})
        shutil.rmtree(folder.parent)
    return found


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each procedure."""
    rows = []
    for name in dict.fromkeys(run["run"] for run in runs):
        own = [run for run in runs if run["run"] == name]
        rows.append(
            {
                "run": name,
                "kills": sum(len(run["killed"]) for run in own),
                "resumed runs": len(own),
                "ended equal, bit for bit": sum(run["unlike"] is None for run in own),
                "files left behind": sum(len(run["left"]) for run in own),
            }
        )
    return rows


def carry_out(
    out: Path, *, seed: int = 0, clock: int = 2, only: list[str] | None = None, most: int = 999
) -> dict[str, Any]:
    """Kill runs of all procedures, or of ``only`` some; write ``kills.json``, anew behind each of them.

    Args:
        clock: kills by the clock of each procedure, besides those at its places.
        most: runs of each procedure that are killed.
    """
    procedures.quick()
    chance, began = random.Random(seed), time.monotonic()
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with procedures.workplace() as place:
        for name, go in procedures.procedures(place).items():
            if only is None or name in only:
                runs += trial(place, name, go, chance, clock, most)
                found = summary(runs) | {"seed": seed, "seconds": round(time.monotonic() - began)}
                procedures.write(out, "kills", found)
                print(found["table"][-1], flush=True)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
    kills = Counter(place for run in runs for place in run["killed"])
    return {
        "what": "Runs killed by SIGKILL at named places and at random times, resumed, and compared with the "
        "run that was left alone: the student's files, figures and log. After each kill the newest "
        "checkpoint was good, and no older than before.",
        "holds": all(run["unlike"] is None and not run["left"] for run in runs),
        "command": "python -m tests.faults.kills --out FOLDER",
        "table": table(runs),
        "kills by place": {place: kills[place] for place in (*PLACES, CLOCK)},
        "not equal": [run for run in runs if run["unlike"] is not None or run["left"]],
    }


def main(carry: Callable[..., dict[str, Any]] = carry_out) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a procedure; all by default")
    parser.add_argument("--clock", type=int, default=2, help="kills by the clock, of each procedure")
    given = parser.parse_args()
    found = carry(given.out, seed=given.seed, clock=given.clock, only=given.only)
    if not found["holds"]:
        raise SystemExit("a run did not end as the one that was left alone")


if __name__ == "__main__":
    main()
