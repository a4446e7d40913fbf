"""Ways to do the same, timed in turn in one process, and what was seen written down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from limbeck.api import versions
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine

HERE = Path(__file__).parent
Times = dict[str, list[float]]


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int) -> Times:
    """Seconds of each call of each side: A B A B ..., so that a slow moment of the machine hits all alike."""
    times: Times = {name: [] for name in sides}
    for place in range(warmup + repeats):
        for name, side in sides.items():
            settle()
            began = time.perf_counter()
            side()
            settle()
            if place >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def settle() -> None:
    """Wait until a GPU, where one is at work, has done all that it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def medians(times: Times) -> dict[str, float]:
    """Milliseconds of each side."""
    return {name: round(1000 * median(values), 3) for name, values in times.items()}


def ratio(times: Times, over: str, under: str) -> float:
    """How many times longer ``over`` takes than ``under``, by their medians."""
    return round(median(times[over]) / median(times[under]), 3)


def arguments(doc: str | None, default: int, output: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=default, help=f"timed rounds ({default})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where a benchmark is told of it (cpu)")
    parser.add_argument("--out", type=Path, default=HERE / output, help="the JSON file to write")
    parser.add_argument("--set", action="append", default=[], help="override of the shipped pair's recipe")
    return parser


@contextmanager
def scratch_run(threads: int, device: str = "cpu") -> Iterator[Run]:
    """A run in a folder that is deleted afterwards; settings as shipped."""
    torch.set_num_threads(threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(Path(folder) / "run", Engine(device=device), seed=0, quiet=True) as run,
    ):
        yield run


def write(path: Path, repeats: int, figures: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures with what made them, and show them as a table."""
    words = sys.argv[1:]
    if "--out" in words:  # a folder of this machine
        place = words.index("--out")
        del words[place : place + 2]
    command = [f"benchmarks/{Path(sys.argv[0]).name}", *words]
    made = {
        "command": f"python {shlex.join(command)}",
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_initialized() else platform.machine(),
        "versions": versions(),
    }
    path.write_text(json.dumps({**made, "figures": figures}, indent=1) + "\n", encoding="utf-8")
    for row in figures:
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
    print(f"written to {path}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
