"""A little of each part of ``make faults``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults import flips, full, kills, memory, page, poison

from limbeck import api
from limbeck.metrics import cost


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parts switch off in processes of their own is on again for other tests."""
    monkeypatch.setattr(cost, "latency", cost.latency)
    monkeypatch.setattr(api, "write_page", api.write_page)


def test_killed_runs_end_as_the_one_left_alone(tmp_path: Path) -> None:
    found = kills.carry_out(tmp_path, seed=3, only=["distill"], clock=1, most=6)
    assert found["holds"], found["not equal"]
    assert sum(found["kills by place"].values()) >= 5


def test_no_flipped_bit_passes_unnoticed(tmp_path: Path) -> None:
    found = flips.carry_out(tmp_path, seed=3, count=48, only=("static",))
    assert found["holds"], found
    assert {"a checkpoint's facts", "recipe.yaml", "the student"} <= {row["file"] for row in found["table"]}


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    at = (
        "a checkpoint: weights without facts",
        "a cache: between its rows",
        "the student: before it is saved",
    )
    found = full.carry_out(tmp_path, only=("static",), at=at)
    assert found["cases"] == len(at)
    assert found["holds"], found["wrong"]


def test_what_a_run_cannot_live_on_is_one_line(tmp_path: Path) -> None:
    names = ("NaN in the data", "an infinity in the teacher", "NaN in the gradient", "a data set that raises")
    found = poison.carry_out(tmp_path, names)
    assert found["holds"], found["cases"]
    said = {case["fault"]: case["said"] for case in found["cases"]}
    assert "the input data is not finite, first at sample 37" in said["NaN in the data"]
    assert "sample 37 cannot be read (OSError: this sample is gone)" in said["a data set that raises"]


def test_growth_is_told_from_noise() -> None:
    noise = [10**8 + 4096 * (place * 7 % 5) for place in range(400)]
    flat = memory.slope(noise)
    assert abs(flat["slope"]) < memory.MOST
    growing = memory.slope([value + 10 * 2048 * place for place, value in enumerate(noise)])
    assert growing["low"] > memory.MOST


@pytest.mark.parametrize("more", [{"table": [{"file": "a|b", "flips": 3, "fine": True}]}, {"cases": 3}])
def test_the_page_tells_what_was_found(tmp_path: Path, more: dict[str, Any]) -> None:
    found = {"what": "Bits.", "holds": True, "command": "python", "versions": {"torch": "2"}} | more
    (tmp_path / "other.json").write_text(json.dumps(found))
    (tmp_path / "flips.json").write_text(json.dumps(found | {"holds": False}))
    text = page.page(tmp_path)
    assert text.index("## Flipped bits") < text.index("## other")
    assert text.count("**It does not hold.**") == 1
    assert ("| a\\|b | 3 | yes |" in text) == ("table" in more)
    assert ("| cases | 3 |" in text) == ("cases" in more)
