"""What ``limbeck plan`` foresees against what the run then takes: time, resident memory, caches on disk.

Plan and run are processes of their own, one after the other, on an empty cache. Caches are the largest that a
look at the disk every 20 ms finds, memory is the kernel's peak of the process, time ``time.seconds`` of the
result. ``--clock cpu`` lets both count the processor's time of their process in the place of the clock's:
what other work on the machine takes is then in neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from side_by_side import arguments, write

RECIPES: dict[str, tuple[str, ...]] = {
    "kd-cnn": (),
    "lm-kd": ("scenario.epochs=2", "scenario.epoch_steps=100"),
    "cdl-kdp": (),
}
MAIN = "import sys; from limbeck.cli import main; main(sys.argv[1:])"
CODE = {"wall": MAIN, "cpu": f"import time; time.perf_counter = time.monotonic = time.process_time; {MAIN}"}
REQUIRED = 1.25
"""Forecast over real, either way up."""


def main() -> None:
    """Plan and run each recipe with each seed."""
    parser = arguments(__doc__, 3, "plan.json")
    parser.add_argument("--clock", choices=CODE, default="wall", help="which time is counted (wall)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = []
    for recipe, own in RECIPES.items():
        sets = [f"--set={item}" for item in (*own, *given.set)]
        seen = [
            compared(
                recipe, [*sets, f"--seed={seed}", f"--set=engine.threads={given.threads}"], CODE[given.clock]
            )
            for seed in range(given.repeats)
        ]
        ratios = {
            name: [round(one["plan"][name] / one["run"][name], 3) for one in seen]
            for name in ("seconds", "memory_bytes", "cache_bytes")
            if all(one["run"][name] for one in seen)
        }
        middle = {name: median(values) for name, values in ratios.items()}
        figures.append({
            "recipe": recipe, "set": list(own), "clock": given.clock, "forecast_over_real": middle,
            "seeds": list(range(given.repeats)), "each": ratios, "seen": seen, "required_within": REQUIRED,
        })  # fmt: skip
        write(given.out, given.repeats, figures)


def compared(recipe: str, options: list[str], code: str) -> dict[str, Any]:
    """What was foreseen, and what came."""
    with tempfile.TemporaryDirectory() as folder:
        out = [*options, f"--out={Path(folder) / 'run'}", "--json"]
        plan, _ = carried_out(["plan", recipe, *out], Path(folder), code)
        assert not list(Path(folder).iterdir()), "a plan left something behind"
        run, watched = carried_out(["run", recipe, *out], Path(folder), code)
    foreseen = {name: plan[name] for name in ("seconds", "memory_bytes", "probe_seconds")}
    return {
        "plan": foreseen | {"cache_bytes": plan["cache_bytes"]["run"] + plan["cache_bytes"]["shared"]},
        "run": {"seconds": run["time"]["seconds"], **watched},
    }


def carried_out(command: list[str], folder: Path, code: str) -> tuple[dict[str, Any], dict[str, int]]:
    """What a command prints as JSON; its peak memory, and the most that caches took in ``folder``."""
    said = folder.with_suffix(".json")
    with said.open("w") as to:
        process = subprocess.Popen([sys.executable, "-c", code, *command], stdout=to)
        most, status, usage = 0, 0, None
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            most = max(most, cache_size(folder))
            if done:
                break
            time.sleep(0.02)
    if status:
        raise SystemExit(f"limbeck {' '.join(command)} failed")
    text = said.read_text()
    said.unlink()
    return json.loads(text), {"memory_bytes": 1024 * usage.ru_maxrss, "cache_bytes": most}


def cache_size(folder: Path) -> int:
    """Bytes of captured rows on disk."""
    total = 0
    for path in folder.rglob("*.bin"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # deleted just now
            continue
    return total


if __name__ == "__main__":
    main()
