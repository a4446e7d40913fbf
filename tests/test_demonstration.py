"""Demonstrations: verdicts on predictions, and the table that the program writes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck import demonstration
from limbeck.demonstration import demonstrate, verdict
from limbeck.errors import ConfigError
from limbeck.report.seen import write_index

SMALL = ("scenario.tasks=2", "scenario.epochs=1", "engine.threads=1", "data.test_fraction=0.5")


def spread(low: float, high: float) -> dict[str, Any]:
    mean = (low + high) / 2
    return {"mean": mean, "sd": 1.0, "n": 3, "interval": [low, high], "values": {"0": mean}}


@pytest.mark.parametrize(
    ("claim", "interval", "answer"),
    [
        ("f > base", (1.0, 3.0), "yes"),
        ("f > base", (-3.0, -1.0), "no"),
        ("f > base", (-1.0, 3.0), "unclear"),
        ("f < base", (-3.0, -1.0), "yes"),
        ("f < base", (1.0, 3.0), "no"),
    ],
)
def test_a_prediction_counts_as_seen_when_its_interval_leaves_zero_out(
    claim: str, interval: tuple[float, float], answer: str
) -> None:
    found = verdict(claim, "own", {}, {"base": {"f": spread(*interval)}})
    assert found["seen"] == answer
    assert found["claim"] == claim


def test_a_prediction_of_what_no_result_has_is_named() -> None:
    have = {"recipe": "own", "figures": {"f": spread(0, 1)}}
    for claim in ("g > base", "f > g"):
        with pytest.raises(ConfigError, match=rf"{claim}.*the figure 'g'"):
            verdict(claim, "own", {"own": have, "base": have | {"recipe": "base"}}, {"base": {}})


def test_a_demonstration_runs_the_baselines_and_writes_what_it_saw(tmp_path: Path) -> None:
    seen = demonstrate(
        ["cdl-kd"], seeds=2, sets=SMALL, runs=tmp_path / "runs", out=tmp_path / "out", label="small"
    )
    written = json.loads((tmp_path / "out" / "cdl-kd-small.json").read_text())
    assert written == seen.data["cdl-kd"]
    assert set(written["methods"]) == {"cdl-kd", "cdl-none"}
    assert set(written["differences"]) == {"cdl-none"}
    own = written["methods"]["cdl-kd"]["figures"]["student.average_accuracy"]["values"]
    alone = written["methods"]["cdl-none"]["figures"]["student.average_accuracy"]["values"]
    paired = written["differences"]["cdl-none"]["student.average_accuracy"]["values"]
    assert paired == pytest.approx({s: own[s] - alone[s] for s in own})
    assert "--set scenario.epochs=1" in written["command"]
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").glob("*/result.json"))]
    demonstrate(["cdl-kd"], seeds=2, sets=SMALL, runs=tmp_path / "runs", out=tmp_path / "out", label="small")
    after = [p.stat().st_mtime_ns for p in sorted((tmp_path / "runs").glob("*/result.json"))]
    assert len(before) == 4
    assert before == after  # finished runs are taken as they are
    table = write_index(tmp_path / "out").read_text()
    assert "| cdl-kd | 2 |" in table
    assert r"teacher.average_accuracy \> student.average_accuracy" in table


def test_one_seed_or_no_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 for a spread"):
        demonstration.demonstrate(["cdl-kd"], seeds=1)
    with pytest.raises(ConfigError, match="name at least one recipe"):
        demonstration.demonstrate([], seeds=2)
