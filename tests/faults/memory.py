"""Watch the resident memory of long runs: 2,000 steps must not make it grow, when they have warmed up.

    python -m tests.faults.memory --out FOLDER

The slope is that of the least-squares line, with the 95 % interval of independent readings, which these are
not quite: memory comes in pages, and pages in batches.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from scipy import stats
from tests.faults import procedures

from limbeck import api
from limbeck.engine import run

FORK = multiprocessing.get_context("fork")
WARM, STEPS, EVERY = 2000, 2000, 10
MOST = (
    1024  # bytes a step, 2 MiB over all: a page of an allocator is far less, a tensor that is kept far more
)
LONG = {
    "static": (12, ()),
    "continual": (10, ("scenario.tasks=5", "student.prompts.pool=5", "teacher.prompts.pool=5")),
    "language": (24, ()),
}
"""How many steps a run takes for each epoch, over all its stages, and what else it is told."""


def resident() -> int:
    """Resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watched(recipe: Any, folder: Path, readings: Any) -> None:
    """Carry out a run and read its memory every few steps, until it has taken all."""
    after = run.Run.after_step
    taken = 0

    def read(own: run.Run, *given: Any) -> None:
        nonlocal taken
        after(own, *given)
        if taken % EVERY == 0:
            readings[taken // EVERY] = resident()
        taken += 1
        if taken == WARM + STEPS:
            os._exit(0)

    procedures.quick()
    run.Run.after_step = read  # type: ignore[method-assign]
    api.run(recipe, out=folder, quiet=True)


def slope(readings: list[int]) -> dict[str, float]:
    """Bytes a step behind those that warm up, with the 95 % interval."""
    kept = readings[WARM // EVERY :]
    steps = [EVERY * place for place in range(len(kept))]
    line = stats.linregress(steps, kept)
    half = float(stats.t.ppf(0.975, len(kept) - 2)) * float(line.stderr)
    return {"slope": float(line.slope), "low": float(line.slope) - half, "high": float(line.slope) + half}


def one(root: Path, name: str) -> dict[str, Any]:
    """The memory of a run of one procedure."""
    each, more = LONG[name]
    longer = (*more, f"scenario.epochs={-(-(WARM + STEPS) // each)}", "engine.checkpoint_seconds=2")
    recipe = procedures.recipe(root / "networks", name, root / "caches", *longer)
    readings = FORK.Array("q", (WARM + STEPS) // EVERY)
    process = FORK.Process(target=watched, args=(recipe, root / name, readings))
    process.start()
    process.join()
    found = list(readings)
    if process.exitcode or not all(found):
        raise SystemExit(f"the run of {name} ended, {process.exitcode}, before {WARM + STEPS} steps")
    line = slope(found)
    return {
        "run": name, "steps": STEPS, "resident, MiB": round(found[-1] / 2**20, 1),
        "slope, bytes a step": round(line["slope"], 1),
        "95 % interval": f"{line['low']:.1f} to {line['high']:.1f}", "readings": found,
    }  # fmt: skip


def carry_out(out: Path) -> dict[str, Any]:
    """Watch all of ``LONG``; write ``memory.json``."""
    procedures.quick()
    began = time.monotonic()
    with procedures.workplace() as root:
        runs = [one(root, name) for name in LONG]
    found = {
        "what": f"Resident memory over {STEPS:,} steps behind {WARM:,} that warm up, with checkpoints every "
        f"two seconds. Flat means a slope of less than {MOST:,} bytes a step. A stream of five tasks keeps "
        "the test images of each, as they are shown.",
        "holds": all(abs(each["slope, bytes a step"]) < MOST for each in runs),
        "command": "python -m tests.faults.memory --out FOLDER",
        "seconds": round(time.monotonic() - began),
        "table": [{key: value for key, value in each.items() if key != "readings"} for each in runs],
        "readings": {each["run"]: each["readings"] for each in runs},
    }  # fmt: skip
    procedures.write(out, "memory", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    if not carry_out(parser.parse_args().out)["holds"]:
        raise SystemExit("memory grows with the steps")


if __name__ == "__main__":
    main()
