"""What ``make demo`` costs after set-up: time and peak memory of its command, with all that it starts.

The command runs once in a process of its own, on an empty cache.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pairs import SHIPPED
from side_by_side import arguments, write

REQUIRED = {"seconds": 120, "peak_mb": 1500}


def main() -> None:
    """Run the demonstration and look at the clock and the memory."""
    given = arguments(__doc__, 1, "demo_cost.json").parse_args()
    overrides = [part for item in given.set for part in ("--set", item)]
    figures = []
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "limbeck", "run", SHIPPED, *overrides]
            environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
            began = time.monotonic()
            subprocess.run([*command, "--out", str(Path(folder) / "demo")], check=True, env=environment)
            seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # kilobytes on Linux
        row = {"command": f"limbeck run {SHIPPED}", "seconds": round(seconds, 1), "peak_mb": round(peak)}
        figures.append(row | {"required": REQUIRED})
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
