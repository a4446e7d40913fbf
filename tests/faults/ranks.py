"""Several ranks under fire: ``python -m tests.faults.ranks --out FOLDER`` writes ``FOLDER/ranks.json``.

Two ranks against one, cut off and resumed by as many and by another number; a rank that is killed, and one
that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine import small, small_texts
from tests.ranks import ENVIRONMENT, ROOT, TORCHRUN, difference, ended, launched

from limbeck import plain
from limbeck.api import versions
from limbeck.engine.state import write_json

TASK = "tests.faults.on_ranks"
SHARDS = ("none", "teacher", "student", "both")
WITHIN = 1e-5  # largest difference of a weight, of the largest weight: float32 sums in another order
SECONDS = 60.0  # until all ranks have stopped


def place(folder: Path, *sets: str) -> Path:
    """A folder with a small recipe, whose every step has a checkpoint, and a long one."""
    folder.mkdir()
    plan = ("scenario.epochs=2", f"engine.cache_root={folder / 'caches'}", *sets)
    kinds = {
        "recipe": ("engine.checkpoint_seconds=0",),
        "long": ("scenario.epochs=40", "engine.checkpoint_seconds=0.2"),
    }
    for name, more in kinds.items():
        (folder / f"{name}.yaml").write_text(plain.write(small.given(folder, *plan, *more)))
    return folder


def task(name: str, folder: Path, size: int) -> None:
    """Let ``size`` ranks carry out a task of ``on_ranks``."""
    for code, said in ended(launched("-m", TASK, name, folder, size=size)):
        if code:
            raise RuntimeError(f"{name} by {size} ended with {code}: {said}")


def matrix(folder: Path) -> dict[str, Any]:
    """Runs of one and two ranks, whole and cut off, against each other."""
    folder = place(folder)
    for size in (1, 2):
        task("whole", folder, size)
    for size in (1, 2):
        task("resumed", folder, size)
    pairs = {
        "two ranks, one rank": ("whole2", "whole1"), "two, resumed by two, two": ("same2", "whole2"),
        "one, resumed by one, one": ("same1", "whole1"), "two, resumed by one, one": ("other2", "whole1"),
        "one, resumed by two, one": ("other1", "whole1"),
    }  # fmt: skip
    found = {name: difference(folder / one, folder / other) for name, (one, other) in pairs.items()}
    exact = ("two, resumed by two, two", "one, resumed by one, one")
    return {
        "largest_difference": found,
        "sound": all(found[name] == 0 for name in exact) and max(found.values()) < WITHIN,
    }


def sharded(folder: Path) -> dict[str, Any]:
    """A network that learns from another, a language model and a stream of tasks: both whole, one of them
    shared out, or both; cut off too."""
    folder.mkdir()
    caches = f"engine.cache_root={folder / 'caches'}"
    small_text = ("scenario.epochs=1", "student.layers=2", "scenario.optim.clip=1.0")
    recipes = {
        "language": small_texts.given(folder, caches, *small_text),
        "continual": small.given(folder, caches, "scenario.epochs=1"),
    }
    found: dict[str, float] = {}
    for name, recipe in recipes.items():
        runs = folder / name
        runs.mkdir()
        (runs / "recipe.yaml").write_text(plain.write(recipe))
        task("sharded", runs, 2)
        task("sharded", runs, 1)
        pairs = {shard: (f"{shard}2", "none1") for shard in SHARDS} | {
            "both, resumed by two, both": ("same2", "both2"),
            "both, resumed by one, none": ("other2", "none1"),
        }
        found |= {
            f"{name}: {case}": difference(runs / one, runs / other) for case, (one, other) in pairs.items()
        }
    exact = all(value == 0 for case, value in found.items() if case.endswith("by two, both"))
    return {"largest_difference": found, "sound": exact and max(found.values()) < WITHIN}


def begun(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until the run in ``folder`` has logged a step."""
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"ended before a step: {ended(processes)}")
        time.sleep(0.05)


def spoken(said: str) -> list[str]:
    """The lines that the program itself wrote."""
    return [line for line in said.splitlines() if line.startswith("limbeck: ")]


def killed(folder: Path) -> dict[str, Any]:
    """One of two ranks is killed, the first or the second: how long the other lives on, what it says, and
    what comes of the run when two go on with it."""
    folder.mkdir()
    uncut = place(folder / "uncut")
    task("long", uncut, 2)
    found = {name: one_killed(place(folder / name), rank) for rank, name in enumerate(("first", "second"))}
    for name, each in found.items():
        task("on", folder / name, 2)
        each["difference_when_resumed"] = difference(folder / name / "killed", uncut / "killed")
    return {
        **found,
        "sound": all(_stopped(each) and each["difference_when_resumed"] == 0 for each in found.values()),
    }


def one_killed(folder: Path, rank: int) -> dict[str, Any]:
    """``rank`` is killed when the run has begun."""
    processes = launched("-m", TASK, "long", folder)
    begun(folder / "killed", processes)
    since = time.monotonic()
    processes[rank].send_signal(signal.SIGKILL)
    code, said = ended(processes)[1 - rank]
    return told(since, code, said, folder)


def told(since: float, code: int, said: str, folder: Path) -> dict[str, Any]:
    """How long it took to stop, and what was said meanwhile."""
    return {
        "seconds": time.monotonic() - since, "code": code, "said": spoken(said),
        "traceback": "Traceback" in said, "free": _free(folder / "killed"),
    }  # fmt: skip


def _stopped(found: dict[str, Any]) -> bool:
    one_line = len(found["said"]) == 1 and not found["traceback"]
    return bool(found["code"] != 0 and one_line and found["free"] and found["seconds"] < SECONDS)


def _free(run: Path) -> bool:
    """Whether nobody holds the folder."""
    code = f"import fcntl; fcntl.flock(open({str(run / 'metrics.jsonl')!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def killed_under_torchrun(folder: Path) -> dict[str, Any]:
    """The same, where torchrun watches over the ranks, which are killed as soon as one is."""
    folder = place(folder)
    command = [sys.executable, *TORCHRUN, TASK, "long", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begun(folder / "killed", [process])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    since = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    ((code, said),) = ended([process])
    found = told(since, code, said, folder) | {"traceback": False}  # torchrun's own is there
    return {**found, "sound": _stopped(found)}


def failed(folder: Path) -> dict[str, Any]:
    """One rank alone raises an error: it is told once, with the exit code of such errors."""
    both = ended(launched("-m", TASK, "failing", place(folder)))
    said = [line for _, text in both for line in spoken(text)]
    found: dict[str, Any] = {"codes": [code for code, _ in both], "said": said}
    found["traceback"] = any("Traceback" in text for _, text in both)
    once = len(said) == 1 and said[0].endswith("sample 3 cannot be read: mend it")
    return {**found, "sound": once and found["codes"] == [2, 2] and not found["traceback"]}


def interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C reaches both: they stop behind the same step, one says so, and the run can go on."""
    folder.mkdir()
    uncut, cut = place(folder / "uncut"), place(folder / "cut")
    task("long", uncut, 2)
    processes = launched("-m", TASK, "long", cut)
    begun(cut / "killed", processes)
    since = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGINT)
    both = ended(processes)
    said = [line for _, text in both for line in spoken(text)]
    found: dict[str, Any] = {
        "seconds": time.monotonic() - since, "codes": [code for code, _ in both], "said": said,
        "free": _free(cut / "killed"),
    }  # fmt: skip
    task("on", cut, 2)
    found["difference_when_resumed"] = difference(cut / "killed", uncut / "killed")
    told_once = len(said) == 1 and found["codes"] == [130, 130] and found["free"]
    return {**found, "sound": told_once and found["difference_when_resumed"] == 0}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "resume": matrix, "sharded": sharded, "killed": killed, "killed_under_torchrun": killed_under_torchrun,
    "failed": failed, "interrupted": interrupted,
}  # fmt: skip


def table(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page shows: for each case how far weights are apart, or how all ranks stopped."""
    rows: list[dict[str, Any]] = []
    for part, found in parts.items():
        pairs = found.get("largest_difference", {})
        rows += [
            {"case": name if part == "resume" else f"FSDP2, {name}", "largest difference": f"{value:.1e}"}
            for name, value in pairs.items()
        ]
        cases = {name: each for name, each in found.items() if isinstance(each, dict) and "said" in each}
        if "said" in found:
            cases = {"": found}
        for name, each in cases.items():
            resumed = each.get("difference_when_resumed")
            rows.append({
                "case": f"{part.replace('_', ' ')} {name}".strip(),
                "largest difference": "" if resumed is None else f"{resumed:.1e}, resumed",
                "all stopped after, s": f"{each['seconds']:.1f}" if "seconds" in each else "",
                "said": " / ".join(each["said"]).removeprefix("limbeck: "),
            })  # fmt: skip
    return rows


def main() -> int:
    """Carry out all parts; 1 where one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(PARTS))
    given = parser.parse_args()
    parts: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            found = PARTS[name](Path(folder) / name)
            parts[name] = json.loads(json.dumps(found).replace(folder, "FOLDER"))
            print(name, json.dumps(parts[name], indent=1), flush=True)
    sound = all(part["sound"] for part in parts.values())
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "ranks.json", {
        "what": "Two processes on one run (gloo, one thread each): against one process, cut off and resumed "
        "by as many and by another number, with networks that are shared out; a rank that is killed, one "
        "that fails, both interrupted. Differences are of a weight, of the largest weight: at most "
        f"{WITHIN:g}, and 0 where as many go on. All stop within {SECONDS:g} s, with one line.",
        "holds": sound, "command": "python -m tests.faults.ranks --out FOLDER", "seed": 0,
        "seconds": round(time.monotonic() - began), "table": table(parts), "parts": parts,
        "versions": versions(),
    })  # fmt: skip
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
