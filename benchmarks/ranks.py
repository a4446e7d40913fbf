"""The time of a stage by one rank and by two, on one machine and one global batch.

Each training is a run of its own, in turn: one rank, two ranks, one rank, ... The time is that of the
student's stage, without start, teacher and figures. Every rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from limbeck import plain
from limbeck.api import versions

SIZES = {"small": (64, 2, 16), "larger": (192, 4, 32)}  # width, layers, rows of a global batch


def recipe(size: str, steps: int) -> dict[str, Any]:
    """A small language model that learns texts from a live teacher twice as wide."""
    width, layers, rows = SIZES[size]
    return {
        "name": f"ranks-{size}",
        "teacher": {
            "name": "trained", "network": {"name": "llama", "layers": layers, "width": 2 * width, "heads": 4},
        },
        "student": {"name": "llama", "layers": layers, "width": width, "heads": 4},
        "objective": [{"name": "labels"}, {"name": "divergence"}],
        "scenario": {
            "name": "language", "epochs": 1, "epoch_steps": steps, "batch_size": rows, "eval_rows": 8,
            "teacher_epochs": 1,
        },
        "data": {"name": "python_texts", "length": 128},
        "engine": {"threads": 1, "cache": False, "diagnose_every": 0, "device": "cpu"},
    }  # fmt: skip


def seconds(given: dict[str, Any], ranks: int) -> float:
    """The time of the stage ``train`` of a run by so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "recipe.yaml").write_text(plain.write(given))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = ["-m", "limbeck", "run", str(place / "recipe.yaml"), "--out", str(place / "run"), "--json"]
        subprocess.run(
            [sys.executable, *torchrun, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
        )  # fmt: skip
        found = json.loads((place / "run" / "result.json").read_text())
        return float(found["time"]["stages"]["train"])


def main() -> None:
    """Measure and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    rows = {}
    for size in given.sizes:
        taken: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(given.repeats):
            for ranks in taken:
                taken[ranks].append(seconds(recipe(size, given.steps), ranks))
        one, two = (median(times) for times in taken.values())
        rows[size] = {
            "width, layers, rows": SIZES[size], "one_rank_ms": 1e3 * one / given.steps,
            "two_ranks_ms": 1e3 * two / given.steps, "speedup": one / two, "all_seconds": taken,
        }  # fmt: skip
        print(
            f"{size}: one rank {one:.2f} s, two ranks {two:.2f} s, {one / two:.2f} times as fast", flush=True
        )
    found = {
        "rows": rows, "steps": given.steps, "repeats": given.repeats, "backend": "gloo", "seed": 0,
        "cores": os.cpu_count(), "load_at_the_end": os.getloadavg()[0], "versions": versions(),
        "command": f"python benchmarks/ranks.py --steps {given.steps} --repeats {given.repeats}",
    }  # fmt: skip
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
