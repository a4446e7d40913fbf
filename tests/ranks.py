"""Processes that work on one run together, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.engine import small

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launched(*arguments: object, size: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """``python ARGUMENTS`` in ``size`` processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **ENVIRONMENT, "WORLD_SIZE": str(size), "RANK": str(number),
                "LOCAL_RANK": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                **environment,
            },
        )
        for number in range(size)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[tuple[int, str]]:
    """The exit code and what was said to standard error of each."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights, of the largest weight."""
    own, others = small.weights(one), small.weights(other)
    if own.keys() != others.keys():
        return float("inf")
    largest = max(float(value.double().abs().max()) for value in own.values())
    return max(float((own[name].double() - others[name].double()).abs().max()) for name in own) / largest
