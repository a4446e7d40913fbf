"""A run that is stopped by a signal; those that are killed are in ``tests/faults/``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.engine import small

from limbeck import plain

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def started(place: Path, folder: Path) -> subprocess.Popen[str]:
    """``limbeck run`` of a long recipe in a process of its own, in its first stage."""
    recipe = place / "long.yaml"
    recipe.write_text(plain.write(small.given(place, "scenario.epochs=3000", "engine.log_every=1")))
    command = [sys.executable, "-m", "limbeck", "run", str(recipe), "--out", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    return process


def test_a_stopped_run_says_how_to_resume_and_can_be(tmp_path: Path) -> None:
    process = started(tmp_path, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    *_, stopping, last = said.splitlines()
    assert stopping == "stopping after this step; once more to stop at once"
    assert last.startswith("limbeck: stopped in task0/teacher at step ")
    assert last.endswith(f"; continue with: limbeck resume {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "result.json").exists()
    steps = [line["step"] for line in small.lines(tmp_path / "run") if line["event"] == "step"]
    assert steps == list(range(len(steps)))
    checkpoint = json.loads((tmp_path / "run" / "checkpoints" / "000001.json").read_text())
    facts = dict(checkpoint["state"]["$map"])
    assert facts["step"] == len(steps)
