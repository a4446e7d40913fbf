"""What every scenario must keep: a new file in ``scenarios/`` is tested at once, on a small pair."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from torch import nn

from limbeck import api, config, planning, registry
from limbeck.engine import probe
from limbeck.errors import ConfigError
from limbeck.metrics import cost
from limbeck.nets.taps import core
from limbeck.report.run import read_run

COUNTS = ("epochs", "batch_size", "tasks", "generations")
IMAGES = "{channels: 1, size: 8, mean: [0.5], std: [0.5]}"
pytestmark = pytest.mark.parametrize("name", registry.names("scenarios"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


LEARNT = "epochs: 1, batch_size: 32, optim: {lr: 0.01}"
ALONE = "teacher={name: none}"
SQUARED = "objective=[{name: probability_mse, target: labels}, {name: probability_mse}]"
TEXTS = (
    "data={name: python_texts, domains: [sums], shares: [0.05], length: 24}",
    "student={name: llama, layers: 1, width: 8, heads: 2}",
    "teacher={name: trained, network: {name: llama, layers: 1, width: 12, heads: 2}}",
    "objective=[{name: labels}, {name: divergence}]",
)
# What a scenario asks of the small recipe; without phases of its own a teacher comes trained.
PLANS = {
    "language": ("epochs: 2, batch_size: 8, optim: {lr: 0.01}", *TEXTS),
    "teacher_hacking": (
        "epochs: 2, epoch_steps: 4, batch_size: 4, texts: 12, prompts: 6, prompt: 4, evaluations: 3, "
        "oracle: {name: llama, layers: 1, width: 8, heads: 2}, optim: {lr: 0.01}, eval_rows: 6",
        *TEXTS,
    ),
    "search": (
        "epochs: 1, epoch_steps: 6, batch_size: 8, optim: {lr: 0.01}, limit: 1e6, search_rows: 4, "
        "eval_rows: 6, tuning: {epoch_steps: 3}",
        TEXTS[0],
        "student={name: supernet, spaces: [{layers: [1], hidden: [8, 12], ratio: [1, 2], heads: [1, 2]}]}",
        TEXTS[2],
        "objective=[{name: relations}]",
    ),
    "continual": (LEARNT, "scenario.tasks=2", "teacher.prompts.pool=2", "student.prompts.pool=2"),
    "self_distillation": (LEARNT, ALONE, "student.prompts.pool=2", "student.kd_prompts=null"),
    "kernel_self_distillation": ("generations: 9", ALONE, "student={name: kernel_ridge}", SQUARED),
}
OTHERS = (
    LEARNT, f"teacher={{name: module, target: '{__name__}:trained', images: {IMAGES}}}",
    "student.prompts.pool=2",
)  # fmt: skip


def recipe(place: Path, name: str, *sets: str) -> config.Recipe:
    plan, *own = PLANS.get(name, OTHERS)
    caches = f"engine.cache_root={place / 'caches'}"
    return small.recipe(place, caches, f"scenario={{name: {name}, {plan}}}", *own, *sets)


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
    own = ("perplexity",) if TEXTS[0] in PLANS.get(name, ()) else ("class_names", "brier", "confusion")
    for figure in ("ece", "nll", *own):
        assert result["student"][figure]
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
    asked = recipe(place, name, "engine.checkpoint_seconds=0")
    small.assert_same(killed_and_resumed(asked, tmp_path / "run", at=8), finished(place, name))


def test_a_plan_knows_the_stages_and_leaves_nothing(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {e["stage"]: e["step"] + 1 for e in read_run(finished(place, name)).of("step")}
    for limit in ("FIRST_SECONDS", "LATER_SECONDS"):
        monkeypatch.setattr(probe, limit, 0.0)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    plan = planning.plan(recipe(place, name), out=place / "other").data
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert {stage["name"]: stage["count"] for stage in plan["stages"]} == steps
    assert all(stage["seen"] == min(probe.LEAST, stage["count"]) for stage in plan["stages"])
    assert plan["seconds"] > 0 and plan["memory_bytes"] > 10**8 and plan["in_full_seconds"] > 0
    result = json.loads((finished(place, name) / "result.json").read_text())
    sizes = {who: sum(count.values()) for who, count in plan["parameters"].items()}
    if name != "search":  # whose student is another network than the one that it was found in
        assert sizes["student"] == result["cost"]["student"]["parameters"]


def test_the_student_comes_back(place: Path, name: str) -> None:
    student = api.load_student(finished(place, name))
    assert not student.training
    state = student.state_dict() | core(student).state_dict()
    kept = small.weights(finished(place, name))
    assert kept
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_too_small_numbers_are_refused(name: str) -> None:
    cls = registry.get("scenarios", name)
    counts = [f.name for f in dataclasses.fields(cls) if f.name in COUNTS]
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
