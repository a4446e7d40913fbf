"""What every scenario must keep: a new file in ``scenarios/`` is tested at once, on a small pair."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small
from torch import nn

from limbeck import api, config, registry
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics import cost

IMAGES = "{channels: 1, size: 8, mean: [0.5], std: [0.5]}"
pytestmark = pytest.mark.parametrize("name", registry.names("scenarios"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def recipe(place: Path, name: str, *sets: str) -> config.Recipe:
    caches = f"engine.cache_root={place / 'caches'}"
    plan = f"scenario={{name: {name}, epochs: 1, batch_size: 32, optim: {{lr: 0.01}}}}"
    if name == "continual":
        own = ("scenario.tasks=2", "teacher.prompts.pool=2")
    else:  # without phases of its own a teacher comes trained
        own = (f"teacher={{name: module, target: '{__name__}:trained', images: {IMAGES}}}",)
    return small.recipe(place, "student.prompts.pool=2", caches, plan, *own, *sets)


def trained() -> nn.Module:
    """A teacher that learns nothing here."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@functools.cache
def finished(place: Path, name: str) -> Path:
    api.run(recipe(place, name), out=place / name, quiet=True)
    return place / name


def test_the_result_says_what_was_run(place: Path, name: str) -> None:
    result = json.loads((finished(place, name) / "result.json").read_text())
    assert {"recipe", "scenario", "seed", "data", "protocol", "student", "teacher", "cost"} <= set(result)
    assert result["scenario"] == name
    assert result["protocol"]["evaluated"]
    assert result["student"]["class_names"]
    for figure in ("ece", "nll", "brier", "confusion"):
        assert result["student"][figure] is not None
    assert result["cost"]["student"]["parameters"] > 0
    assert 0 <= result["fidelity"]["agreement"] <= 100


def test_the_same_seed_gives_the_same_run(place: Path, name: str, tmp_path: Path) -> None:
    torch.manual_seed(99)
    api.run(recipe(place, name), out=tmp_path / "again", quiet=True)
    small.assert_same(tmp_path / "again", finished(place, name))


def test_the_kept_recipe_runs_it_again(place: Path, name: str) -> None:
    kept = config.load(finished(place, name) / "recipe.yaml")
    assert kept == recipe(place, name)


def test_killed_and_resumed(place: Path, name: str, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    steps = 0
    diagnoses = Run.diagnoses

    def deadly(run: Run, at: Any) -> bool:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise Killed
        return diagnoses(run, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "diagnoses", deadly)
        with pytest.raises(Killed):
            api.run(recipe(place, name, "engine.checkpoint_seconds=0"), out=tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", finished(place, name))


def test_the_student_comes_back(place: Path, name: str) -> None:
    student = api.load_student(finished(place, name))
    assert not student.training
    state = student.state_dict()
    kept = small.weights(finished(place, name))
    assert kept
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_too_small_numbers_are_refused(name: str) -> None:
    cls = registry.get("scenarios", name)
    counts = [f.name for f in dataclasses.fields(cls) if f.name in ("epochs", "batch_size", "tasks")]
    assert counts
    for field in counts:
        with pytest.raises(ConfigError, match=f"{field} is 0: allowed are values of at least 1"):
            cls(**{field: 0})


def test_fields_are_the_whole_configuration(name: str) -> None:
    choice = registry.get("scenarios", name)()
    plain = config.plain_value(choice, "scenario")
    assert plain.pop("name") == name
    assert config.make(type(choice), plain, "scenario") == choice
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.epochs = 2


def test_docstring_is_complete(name: str) -> None:
    cls = registry.get("scenarios", name)
    text = inspect.getdoc(cls) or ""
    assert text.splitlines()[0].endswith(".")
    assert [f.name for f in dataclasses.fields(cls) if f"{f.name}:" not in text] == []
