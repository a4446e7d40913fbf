"""What a plan foresees is what the run then takes, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine import small, small_texts

from limbeck import api, config, plain, planning
from limbeck.demonstration import demonstrate
from limbeck.engine import capture, probe, ranks
from limbeck.engine.ranks import Ranks
from limbeck.errors import ConfigError, Interrupted
from limbeck.metrics import cost
from limbeck.tournament import arena

REUSED = "engine.reuse_teachers=true"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    monkeypatch.setattr(probe, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(probe, "LATER_SECONDS", 0.0)


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the caches that a run deletes behind a stage."""
    sizes: list[int] = []
    delete = capture.Captured.delete

    def weigh(captured: capture.Captured) -> None:
        assert captured.cache is not None
        sizes.append(rows_in(captured.cache.folder))
        delete(captured)

    monkeypatch.setattr(capture.Captured, "delete", weigh)
    return sizes


def rows_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.bin"))


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def foreseen(recipe: config.Recipe, out: Path) -> dict[str, Any]:
    return planning.plan(recipe, out=out).data


def test_a_stream_with_shared_queries_and_teachers(tmp_path: Path, deleted: list[int]) -> None:
    recipe = small.recipe(tmp_path, REUSED)
    before = contents(tmp_path)
    plan = foreseen(recipe, tmp_path / "runs" / "first")
    assert contents(tmp_path) == before
    result = api.run(recipe, out=tmp_path / "runs" / "first", quiet=True).data
    assert plan["cache_bytes"] == {"run": max(deleted), "shared": rows_in(tmp_path / "runs" / ".cache")}
    assert plan["cache_bytes"]["shared"] > 0
    for who, count in plan["parameters"].items():
        assert count["learning"] == result["cost"][who]["trainable"]
        assert sum(count.values()) == result["cost"][who]["parameters"]
    assert [(stage["name"], stage["there"]) for stage in plan["stages"]][:2] == [
        ("task0/teacher", False), ("task0/student", False),
    ]  # fmt: skip
    kept = contents(tmp_path)
    again = foreseen(recipe, tmp_path / "runs" / "second")
    assert contents(tmp_path) == kept
    teachers = [stage for stage in again["stages"] if stage["name"].endswith("teacher")]
    assert teachers and all(stage["there"] and stage["seconds"] == 0 for stage in teachers)
    assert all(part["there"] == (part["name"] == "query") for part in again["captures"])
    assert again["parameters"]["teacher"]["learning"] == 0


def test_texts_with_a_remembered_teacher(tmp_path: Path, deleted: list[int]) -> None:
    recipe = small_texts.recipe(tmp_path, "engine.cache_dtype=float16")
    plan = foreseen(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    api.run(recipe, out=tmp_path / "run", quiet=True)
    assert plan["cache_bytes"] == {"run": deleted[0], "shared": 0}
    assert plan["captures"][0]["name"] == "teacher"
    assert plan["parameters"]["teacher"]["learning"] == 0


def test_a_stage_is_made_up_of_plain_and_measured_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second is accounted for: with a clock of its own, a step of 1 s and a measured one of 5 s."""
    now = [0.0]
    monkeypatch.setattr(probe.Probe, "clock", lambda _: now[0])
    after = probe.Probe.after_step

    def slow(run: probe.Probe, stage: str, turns: Any, at: Any, *rest: Any) -> None:
        now[0] += 5.0 if run.diagnoses(at) else 1.0
        after(run, stage, turns, at, *rest)

    monkeypatch.setattr(probe.Probe, "after_step", slow)
    sets = ("scenario.tasks=1", "scenario.epochs=20", "engine.diagnose_every=10", "engine.cache=false")
    stages = foreseen(small.recipe(tmp_path, *sets), tmp_path / "run")["stages"]
    for stage in stages:
        measured = len(range(1, stage["count"], 10))
        assert stage["seconds"] == pytest.approx(stage["count"] + 4 * measured)
        assert stage["seen"] == probe.LEAST < stage["count"]


def test_what_a_run_would_refuse_a_plan_refuses(tmp_path: Path) -> None:
    recipe = small.given(tmp_path, "scenario.batch_size=5000")
    (tmp_path / "recipe.yaml").write_text(plain.write(recipe))
    with pytest.raises(ConfigError, match="batch_size is 5000"):
        planning.plan(tmp_path / "recipe.yaml", out=tmp_path / "run")


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "here", lambda: Ranks(1, 2))
    for name, ask in {
        "plan": lambda: planning.plan("kd-cnn", out=tmp_path / "run"),
        "demonstrate": lambda: demonstrate(["kd-cnn"], seeds=2, out=tmp_path / "seen"),
        "arena": lambda: arena("kd-cnn", out=tmp_path / "arena"),
        "export": lambda: api.export(tmp_path / "run"),
    }.items():
        with pytest.raises(ConfigError, match=f"limbeck {name} was started on 2 ranks: start it on one"):
            ask()


def test_a_plan_that_is_stopped_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: probe.Probe, *_: Any) -> None:
        run.stop.set()
        run.heed("here")

    monkeypatch.setattr(probe.Probe, "after_step", stop)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(Interrupted, match="nothing was kept"):
        planning.plan(small.recipe(tmp_path), out=tmp_path / "run")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_plan_is_plain_data(tmp_path: Path) -> None:
    plan = planning.plan(small.recipe(tmp_path, "scenario.tasks=1"), out=tmp_path / "run")
    assert json.loads(json.dumps(plan.data)) == plan.data
    assert plan.data["probe_seconds"] > 0
