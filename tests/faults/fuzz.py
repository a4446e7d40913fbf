"""Strangers' input by the thousand: what is given either works or is refused in one line.

``python -m tests.faults.fuzz --out FOLDER`` writes ``FOLDER/fuzz.json``. A fault is a traceback, a refusal of
several lines, a case that takes too long or too much memory, or a canary that was touched: code that a file
brought along was run. Every case follows from the seed, its kind and its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from tests.faults import hostile_data, hostile_nets, hostile_recipes, hostile_runs
from tests.faults.hostile import CANARY, Case

from limbeck.errors import LimbeckError

SECONDS = 10.0
"""A case that takes longer hangs."""
GROWTH = 512 * 2**20
"""Bytes of resident memory by which a case may raise the highest mark."""
SPACE = 8 * 2**30
"""Bytes of address space that all cases together may take."""
SHOWN = 200
"""So many faults are written out in full."""

KINDS: dict[str, tuple[int, Callable[[Random, Path, int], Iterator[Case]]]] = {
    **hostile_recipes.KINDS,
    **hostile_data.KINDS,
    **hostile_nets.KINDS,
    **hostile_runs.KINDS,
}
"""The share of each kind among all cases, and what makes them."""


class TooLong(BaseException):
    """Raised inside a case when its time is over; nothing that a case calls catches it."""


@dataclass
class Tally:
    """What one kind's cases came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_case: str = ""
    errors: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, Any]:
        """What a table shows of it."""
        return {
            "cases": sum(self.outcomes.values()),
            "accepted": self.outcomes["accepted"],
            "refused": self.outcomes["refused"],
            "faults": self.outcomes["fault"],
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self.row() | {
            "refused_as": dict(sorted(self.errors.items())),
            "seconds": round(self.seconds, 2),
            "slowest_seconds": round(self.slowest, 3),
            "slowest_case": self.slowest_case.replace(tempfile.gettempdir(), "FOLDER")[:300],
        }


WHAT = (
    "Recipes, overrides, data folders, images, texts, weights, tokenizers, run folders and commands, made by "
    "grammars or from good ones by random changes. Each must be accepted, or refused in one line; no "
    "traceback, no hang, no run code, little memory."
)


class Judge:
    """Runs cases and keeps what came of them."""

    def __init__(self, under_way: Path | None = None) -> None:
        self.under_way = under_way  # holds the case that runs: what is left to read when a process dies of it
        self.kinds: dict[str, Tally] = {}
        self.faults: list[dict[str, str]] = []

    def __call__(self, kind: str, number: int, case: Case) -> None:
        """Run one case."""
        tally = self.kinds.setdefault(kind, Tally())
        if self.under_way is not None:
            self.under_way.write_text(f"{kind}, {number}: {case.said}\n", encoding="utf-8", errors="replace")
        before, start = highest_memory(), time.perf_counter()
        found = self._outcome(case, tally)
        spent = time.perf_counter() - start
        if highest_memory() - before > GROWTH:
            found = f"memory grew by {(highest_memory() - before) / 2**20:.0f} MiB"
        if CANARY.exists():
            CANARY.unlink()
            found = "code from a file was run"
        tally.seconds += spent
        if spent > tally.slowest:
            tally.slowest, tally.slowest_case = spent, case.said
        tally.outcomes[found if found in ("accepted", "refused") else "fault"] += 1
        if found not in ("accepted", "refused"):
            self.faults.append({"kind": kind, "case": str(number), "given": case.said[:2000], "found": found})

    def _outcome(self, case: Case, tally: Tally) -> str:
        try:
            with time_limit(SECONDS):
                case.run()
        except LimbeckError as error:
            tally.errors[type(error).__name__] += 1
            return "refused" if len(str(error).splitlines()) == 1 else f"not one line: {error}"
        except TooLong:
            return f"took more than {SECONDS} s at\n{traceback.format_exc()[-1500:]}"
        except BaseException:
            return traceback.format_exc()[-3000:]
        return "accepted"

    @property
    def cases(self) -> int:
        """How many were run."""
        return sum(sum(tally.outcomes.values()) for tally in self.kinds.values())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TooLong`` when the time is over; where compiled code does not come back, end the process."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def highest_memory() -> int:
    """The highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(cases: int, seed: int, kinds: Sequence[str] = tuple(KINDS), under_way: Path | None = None) -> Judge:
    """Run ``cases`` in all, shared among ``kinds``; the same seed gives the same cases."""
    judge = Judge(under_way)
    whole = sum(KINDS[kind][0] for kind in kinds)
    with tempfile.TemporaryDirectory(prefix="limbeck-fuzz-") as folder, bounded_space():
        CANARY.unlink(missing_ok=True)
        for kind in kinds:
            share, make = KINDS[kind]
            place = Path(folder) / kind
            place.mkdir()
            for number, case in enumerate(make(Random(f"{seed} {kind}"), place, -(-cases * share // whole))):
                judge(kind, number, case)
            shutil.rmtree(place, ignore_errors=True)
    return judge


@contextmanager
def bounded_space() -> Iterator[None]:
    """Ask for no more address space than ``SPACE``: what asks for more gets an error, not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write(judge: Judge, path: Path, seed: int, seconds: float) -> None:
    """Write what was found as JSON."""
    versions = ("limbeck", "torch", "transformers", "tokenizers", "safetensors", "pyyaml", "pillow", "numpy")
    found = {
        "what": WHAT,
        "holds": not judge.faults,
        "command": shlex.join(["python", "-m", "tests.faults.fuzz", *sys.argv[1:]]),
        "seed": seed,
        "cases": judge.cases,
        "faults": len(judge.faults),
        "seconds": round(seconds, 1),
        "highest_memory_mib": highest_memory() // 2**20,
        "limit_seconds": SECONDS,
        "table": [{"kind": kind} | tally.row() for kind, tally in judge.kinds.items()],
        "kinds": {kind: tally.as_dict() for kind, tally in judge.kinds.items()},
        "first_faults": judge.faults[:SHOWN],
        "machine": {"system": platform.system(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {n: metadata.version(n) for n in versions},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line; exits with 1 where there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of fuzz.json")
    parser.add_argument("--cases", type=int, default=10_300, help="about how many cases (10300)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (0)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    asked = parser.parse_args()
    start = time.perf_counter()
    asked.out.mkdir(parents=True, exist_ok=True)
    under_way = asked.out / "under-way.txt"
    judge = fuzz(asked.cases, asked.seed, asked.kinds, under_way)
    under_way.unlink()
    write(judge, asked.out / "fuzz.json", asked.seed, time.perf_counter() - start)
    for kind, tally in judge.kinds.items():
        print(kind, {k: v for k, v in tally.as_dict().items() if k not in ("slowest_case",)})
    print(f"{judge.cases} cases, {len(judge.faults)} faults: {asked.out / 'fuzz.json'}")
    sys.exit(1 if judge.faults else 0)


if __name__ == "__main__":
    main()
