"""What trackers hold, read back with their own readers; runs that are cut off, and trackers that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.engine import small
from tests.engine.killing import killed_and_resumed

from limbeck import api
from limbeck.engine import tracking
from limbeck.errors import ConfigError
from limbeck.metrics import cost

Points = dict[tuple[str, int], list[float]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def in_tensorboard(folder: Path) -> tuple[Points, dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracking" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: Points = {}
    for name in events.Tags()["scalars"]:
        for point in events.Scalars(name):
            found.setdefault((name, point.step), []).append(point.value)
    (text,) = events.Tensors("recipe/text_summary")
    (said,) = text.tensor_proto.string_val
    return found, {"scenario.tasks": "2"} if "\n      tasks: 2\n" in said.decode() else {}


def in_mlflow(folder: Path) -> tuple[Points, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'tracking' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "limbeck"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    found: Points = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found.setdefault((name, point.step), []).append(point.value)
    return found, run.data.params


def in_trackio(folder: Path) -> tuple[Points, dict[str, Any]]:
    """In a process of its own, where it is told its folder as its users tell it."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as s; name = sys.argv[1]\n"
        "print(json.dumps([s.get_logs('limbeck', name), s.get_run_config('limbeck', name)]))"
    )
    where = os.environ | {"TRACKIO_DIR": str(folder / "tracking")}
    said = subprocess.run(
        [sys.executable, "-c", code, folder.name], env=where, capture_output=True, check=True
    )
    rows, settings = json.loads(said.stdout)
    found: Points = {}
    for row in rows:
        for name in row.keys() - {"step", "timestamp"}:
            found.setdefault((name, row["step"]), []).append(row[name])
    return found, {name: str(value) for name, value in settings.items()}


READERS: dict[str, Callable[[Path], tuple[Points, dict[str, Any]]]] = {
    "tensorboard": in_tensorboard, "mlflow": in_mlflow, "trackio": in_trackio,
}  # fmt: skip


def needed(name: str) -> None:
    lacking = [package for package in tracking.TRACKERS[name].needs if find_spec(package) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed here: pip install 'limbeck[track]'")


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """The points that a tracker must have, from the log and the result alone."""
    found: dict[tuple[str, int], float] = {}
    last = before = 0
    stage = ""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            if event["stage"] != stage:
                stage, before = event["stage"], last
            last = before + event["step"] + 1
            kind = stage.split("/")[1]
            found[f"{kind}/loss", last] = event["loss"]
            found |= {(f"{kind}/terms/{name}", last): value for name, value in event["terms"].items()}
        if event["event"] == "evaluation":
            for task, value in enumerate(event["accuracy"]):
                found[f"evaluation/{event['who']}/task{task}", last] = value
    result = json.loads((folder / "result.json").read_text())
    found["final/student.average_accuracy", last] = result["student"]["average_accuracy"]
    return found


def check(folder: Path, name: str) -> None:
    """Each point once, with its value, and the recipe beside them."""
    points, settings = READERS[name](folder)
    assert all(len(values) == 1 for values in points.values())
    expected = logged(folder)
    assert len(expected) > 40
    assert {key: points[key][0] for key in expected} == pytest.approx(expected, rel=1e-6)
    rest = {name for name, _ in points.keys() - expected.keys()}
    assert {name.split("/")[-1] for name in rest if not name.startswith("final/")} <= {
        "lr", "teacher_share", "mean",
    }  # fmt: skip
    assert settings["scenario.tasks"] == "2"


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_killed_run_goes_on_in_the_same_tracked_run(name: str, tmp_path: Path) -> None:
    """The tracker has points from behind the last checkpoint, which the resumed run logs again."""
    needed(name)
    asked = small.recipe(tmp_path, f"engine.track=[{name}]")
    check(killed_and_resumed(asked, tmp_path / "run", at=17), name)


def test_what_was_not_handed_over_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("trackio")
    asked = small.recipe(tmp_path, "engine.track=[trackio]")
    resume, close = api.resume, tracking.Tracking.close

    def again(folder: Path, **given: Any) -> Any:
        assert not (folder / "tracking" / "limbeck.db").exists()
        monkeypatch.setattr(tracking.Tracking, "close", close)
        return resume(folder, **given)

    monkeypatch.setattr(tracking.Tracking, "close", lambda _: None)
    monkeypatch.setattr(api, "resume", again)
    check(killed_and_resumed(asked, tmp_path / "run", at=17), "trackio")


def test_what_waits_is_handed_over_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Listener(tracking.Tracker):
        needs = ()

        def __init__(self, folder: Path, recipe: Any) -> None:
            pass

        def known(self) -> set[tuple[str, int]]:
            return {("student/loss", 2)}

        def add(self, points: tracking.Points) -> None:
            told.append(len(points))
            assert all("student/loss" not in values for step, values in points if step == 2)

        def close(self) -> None:
            told.append(-1)

    monkeypatch.setitem(tracking.TRACKERS, "trackio", Listener)
    steps = [{"event": "step", "stage": "student", "step": n, "loss": 1.0, "lr": 0.1, "teacher_share": 0.0,
              "terms": {}} for n in range(4)]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(steps[0])}\n{json.dumps(steps[1])}\n")
    found = tracking.Tracking(tmp_path, ("trackio",), pytest.fail)
    found.tell(steps[1])
    found.tell(steps[2])
    assert told == []
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
    found.tell(steps[3])
    found.close()
    assert told == [4, 0, -1]


@pytest.mark.parametrize("where", ["__init__", "known", "add", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no room\nat all")

    parts: dict[str, Any] = dict.fromkeys(("__init__", "add", "close"), lambda *_: None)
    parts |= {"known": lambda _: set(), "needs": (), where: fail}
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", type("Failing", (tracking.Tracker,), parts))
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
    sets = ("scenario.tasks=1", "scenario.epochs=1")
    api.run(small.recipe(tmp_path, "engine.track=[mlflow]", *sets), out=tmp_path / "run", quiet=True)
    api.run(small.recipe(tmp_path, *sets), out=tmp_path / "alone", quiet=True)
    assert capsys.readouterr().err.count("tracker mlflow is left out: OSError: no room at all") == 1
    small.assert_same(tmp_path / "run", tmp_path / "alone")


def test_what_cannot_be_tracked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown tracker 'tensorbord' at engine\.track: did you mean 'tensorb"
    ):
        small.recipe(tmp_path, "engine.track=[tensorbord]")
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"needs trackio, not installed here: pip install 'limbeck\[track\]'"
    ):
        api.run(small.recipe(tmp_path, "engine.track=[trackio]"), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
