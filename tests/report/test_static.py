"""The page, the block and the plot of runs of the scenario static."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console
from tests.report.sample_run import write_static

from limbeck.report.compare import compare
from limbeck.report.page import page
from limbeck.report.run import read_run
from limbeck.report.summary import summary


def changed(folder: Path, **more: Any) -> Path:
    """A static run with more in its ``result.json``."""
    path = write_static(folder) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


def shown(folder: Path) -> str:
    console = Console(width=100, record=True, file=(folder / "block.txt").open("w"))
    console.print(summary(json.loads((folder / "result.json").read_text())))
    return console.export_text()


PATHS = {"prompt": {"accuracy": 91.25, "agreement": 97.5, "kl": 0.021, "nll": 0.41, "ece": 0.12}}


def test_the_paths_of_a_teacher_stand_side_by_side(tmp_path: Path) -> None:
    folder = changed(tmp_path / "run", paths=PATHS)
    text = page(read_run(folder))
    assert "The teacher&#39;s paths" in text or "The teacher's paths" in text
    assert '<th scope="row">main</th><td>96.0 %</td><td>93.0 %</td><td>0.120</td>' in text
    assert '<th scope="row">prompt</th><td>91.2 %</td><td>97.5 %</td><td>0.021</td>' in text
    block = shown(folder)
    assert "the teacher's paths" in block
    assert "97.5 %" in block
    assert "paths" not in shown(changed(tmp_path / "plain"))


def test_what_a_selector_found_is_shown_short(tmp_path: Path) -> None:
    found = {"mode": "hard", "fraction": 0.1, "indices": list(range(100)), "lost": []}
    text = page(read_run(changed(tmp_path / "run", selection=found)))
    assert "What the selector found" in text
    assert "<dt>indices</dt><dd>100 values</dd>" in text
    assert "<dt>fraction</dt><dd>0.1</dd>" in text
    assert "What the selector found" not in page(read_run(changed(tmp_path / "plain")))


def test_how_much_a_student_wrote_is_shown(tmp_path: Path) -> None:
    found = {"validation": [2.0, 2.2], "share": [0.0, 0.1], "written": 432}
    text = page(read_run(changed(tmp_path / "run", writing=found)))
    assert "432 written, in a share of the batches that went from 0.00 to 0.10" in text
    assert "texts of its own" not in page(read_run(changed(tmp_path / "plain")))


def test_what_a_search_found_is_shown_without_its_candidates(tmp_path: Path) -> None:
    chosen = {"space": 1, "layers": 4, "hidden": 48, "ratio": 2.0, "heads": 4, "cost": 109920, "loss": 0.0074}
    found = {"cost": "parameters", "limit": 110144.0, "chosen": chosen, "candidates": [chosen] * 48}
    text = page(read_run(changed(tmp_path / "run", search=found)))
    assert "What the search found" in text
    assert "<dt>candidates</dt><dd>48</dd>" in text
    assert "layers 4, hidden 48" in text
    assert "What the search found" not in page(read_run(changed(tmp_path / "plain")))


def test_a_run_without_a_teacher_has_no_column_for_one(tmp_path: Path) -> None:
    folder = changed(tmp_path / "run", teacher=None, fidelity=None)
    path = folder / "result.json"
    result = json.loads(path.read_text())
    result["cost"]["teacher"], result["time"]["teacher_share"] = None, 0.0
    path.write_text(json.dumps(result))
    text = page(read_run(folder))
    assert "student / teacher" not in text
    assert "the teacher's part" not in text
    assert "student / teacher" in page(read_run(changed(tmp_path / "plain")))


def test_licence_and_calibration_are_among_the_figures(tmp_path: Path) -> None:
    text = page(read_run(changed(tmp_path / "run", data_licence="MIT (Zalando)")))
    assert "<dt>licence of the data</dt><dd>MIT (Zalando)</dd>" in text
    for label in ("accuracy", "agreement", "KL", "CKA", "ECE", "NLL", "Brier"):
        assert f"<dt>{label}</dt>" in text


def test_the_plot_of_static_runs_has_what_they_have(tmp_path: Path) -> None:
    folders = [
        write_static(tmp_path / f"{recipe}-{seed}", recipe=recipe, seed=seed, accuracy=accuracy)
        for recipe, accuracy in (("kd", 90.0), ("static", 85.0))
        for seed in range(3)
    ]
    found = compare(folders, baseline="kd")
    difference = found.data["methods"]["static"]["differences"]["student.accuracy"]
    assert difference["mean"] == pytest.approx(-5.0)
    assert difference["n"] == 3
    text = found.plot(tmp_path / "plot.svg").read_text()
    assert all(name in text for name in ("accuracy, %", "agreement, %", "NLL, nats", "less is better"))
    assert matplotlib.image.imread(found.plot(tmp_path / "plot.png")).std() > 0
