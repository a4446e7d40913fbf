"""The arena: who takes part, what is left out and why, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import limbeck
from limbeck import cli, config, entrants, registry, tournament
from limbeck.contracts import Spec
from limbeck.entrants import Places, fitted, places
from limbeck.errors import ConfigError, NonFiniteError
from limbeck.students.cifar_resnet import CifarResNetStudent
from limbeck.students.cnn import CNNStudent
from limbeck.students.mlp import MLPStudent
from limbeck.students.timm import TimmStudent

TINY = (
    "scenario.epochs=2",
    "scenario.teacher_epochs=1",
    "teacher.network.widths=[4, 4, 4]",
    "engine.threads=1",
)
METHODS = ("sp", "dkd", "kd3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


def compete(place: Path, **more: Any) -> tournament.Arena:
    given = {"methods": METHODS, "seeds": 2, "label": "tiny", "quiet": True} | more
    caches = f"engine.cache_root={place / 'caches'}"
    return limbeck.arena("kd-cnn", sets=(*TINY, caches), runs=place / "runs", out=place / "out", **given)


@pytest.fixture(scope="module")
def held(place: Path) -> tournament.Arena:
    return compete(place)


def folder(place: Path, method: str, seed: int) -> Path:
    (found,) = (place / "runs" / "kd-cnn-tiny").glob(f"{method}-????????-s{seed}")
    return found


def finished_at(place: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((place / "runs").rglob("result.json"))]


def test_the_ranking_is_that_of_the_runs(held: tournament.Arena, place: Path) -> None:
    data = held.data
    assert json.loads((place / "out" / "kd-cnn-tiny.json").read_text()) == data
    assert {row["method"] for row in data["ranking"]} == {"ce", "kd", "sp", "dkd"}
    means = [row["figures"]["student.accuracy"]["mean"] for row in data["ranking"]]
    assert means == sorted(means, reverse=True)
    row = next(row for row in data["ranking"] if row["method"] == "sp")
    for seed in (0, 1):
        own, base = (
            json.loads((folder(place, m, seed) / "result.json").read_text())["student"]["accuracy"]
            for m in ("sp", "kd")
        )
        assert row["figures"]["student.accuracy"]["values"][str(seed)] == own
        paired = row["differences"]["student.accuracy"]["values"][str(seed)]
        assert paired == pytest.approx(own - base)
    assert data["budget"] == {"steps": 4, "epochs": 2, "batch": 50}
    assert "limbeck arena kd-cnn --seeds 2 --methods sp" in data["command"]


def test_what_does_not_fit_is_left_out_with_the_reason(held: tournament.Arena) -> None:
    (left,) = held.data["left_out"]
    assert left["method"] == "kd3"
    assert left["reason"] == "the method is more than its objectives: recipe kd3 has the student 'kd3'"


def test_finished_runs_are_kept_and_cut_off_ones_resumed(held: tournament.Arena, place: Path) -> None:
    before = finished_at(place)
    cut = folder(place, "dkd", 1)
    (cut / "result.json").unlink()
    again = compete(place, jobs=2)
    assert again.data["ranking"][0]["figures"] == held.data["ranking"][0]["figures"]
    assert (cut / "result.json").exists()
    assert sum(a == b for a, b in zip(before, finished_at(place), strict=True)) == len(before) - 1


def test_the_page_needs_nothing_beside_itself(held: tournament.Arena) -> None:
    text = held.page.read_text()
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert not re.search(r"@import|url\(", text)
    for word in ("BSD-3-Clause", held.data["command"], "recipe kd3 has the student", "4 optimiser steps"):
        assert word.replace("'", "&#39;") in text, word
    assert text.count('<tr class="base">') == 2
    assert text.count("<g class=") == 2 * len(held.data["ranking"])


def test_the_console_shows_the_ranking(held: tournament.Arena) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(held)
    text = console.export_text()
    assert "minus kd" in text
    assert "left out: kd3" in text


def test_a_method_that_fails_in_a_run_is_left_out(
    place: Path, held: tournament.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_one = tournament.run_one

    def fails(item: Any) -> Path:
        if item[0].name == "dkd" and item[0].seed == 1:
            raise NonFiniteError("train, epoch 0, step 3: loss term 'dkd' is nan")
        return run_one(item)

    monkeypatch.setattr(tournament, "run_one", fails)
    found = compete(place, methods=("sp", "dkd"))
    assert found.data["left_out"] == [
        {"method": "dkd", "reason": "seed 1: train, epoch 0, step 3: loss term 'dkd' is nan"}
    ]
    assert {row["method"] for row in found.data["ranking"]} == {"ce", "kd", "sp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cdl-kd"], "recipe cdl-kd is not of the scenario static"),
        (["static"], "recipe static has no teacher"),
        (["kd", "--seeds", "1"], "seeds is 1: an arena needs at least 2"),
        (["kd", "--methods", "dkdd"], "unknown method 'dkdd': did you mean 'dkd'?"),
    ],
)
def test_what_cannot_be_held_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["arena", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_changed_settings_go_into_other_folders() -> None:
    base, other = config.load("kd"), config.load("kd", ["scenario.optim.lr=0.01"])
    kd, ce = entrants.entrants(["kd"], base)
    marks = {tournament._settings(one, recipe) for one in (kd, ce) for recipe in (base, other)}
    assert len(marks) == 4
    assert tournament._settings(kd, base) in marks


# Who takes part


def test_all_objectives_take_part() -> None:
    asked = [one.name for one in entrants.entrants((), config.load("kd"))]
    assert asked[:2] == ["kd", "ce"]
    assert {name.replace("_", "-") for name in registry.names("objectives")} - {"labels"} <= set(asked)


def test_what_is_added_up_is_said_in_a_line() -> None:
    kd, _, dkd = entrants.entrants(["dkd"], config.load("kd"))
    assert kd.told() == "0.1 labels + 0.9 kd"
    assert kd.origin == "recipe kd"
    assert dkd.told().startswith("labels + dkd")


NETS = {
    "cnn": (CNNStudent(widths=(2, 2, 2)), 8, ("stages.0", "stages.1", "stages.2"), "pool"),
    "four stages": (CNNStudent(widths=(2, 2, 2, 2)), 8, tuple(f"stages.{n}" for n in range(4)), "pool"),
    "mlp": (MLPStudent(hidden=(3, 3)), 8, ("hidden.0", "hidden.1"), "hidden"),
    "resnet": (CifarResNetStudent(depth=8), 32, ("layer1", "layer2", "layer3"), "pool"),
    "timm": (TimmStudent(model="resnet10t"), 32, tuple(f"layer{n}" for n in range(1, 5)), "global_pool"),
    "vit": (
        TimmStudent(model="vit_tiny_patch16_224"),
        224,
        tuple(f"blocks.{n}" for n in range(12)),
        "fc_norm",
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_places_of_networks(name: str) -> None:
    student, size, stages, pooled = NETS[name]
    channels = student.input_spec().channels
    net = student.build(Spec(classes=4, channels=channels, size=size), torch.Generator().manual_seed(0))
    found = places(net)
    assert (found.stages, found.pooled) == (stages, pooled)
    for tap in (*found.stages, found.pooled):
        assert isinstance(net.get_submodule(f"network.{tap}"), torch.nn.Module)


def test_taps_move_by_depth() -> None:
    deep = Places(tuple(f"blocks.{n}" for n in range(12)), "fc_norm")
    assert [deep.at(f"stages.{n}") for n in range(3)] == ["blocks.3", "blocks.7", "blocks.11"]
    three = Places(("layer1", "layer2", "layer3"), "pool")
    assert [three.at(tap) for tap in ("blocks.-1", "blocks.3", "stages.-1", "pool", "head")] == [
        "layer3", "layer1", "layer3", "pool", "head",
    ]  # fmt: skip
    (_, _, at) = entrants.entrants(["at"], config.load("kd"))
    (_, moved) = fitted(at, three, deep).objective
    assert moved.needs().student == ("layer1", "layer2", "layer3")
    assert moved.needs().teacher == ("blocks.3", "blocks.7", "blocks.11")


def test_a_recipe_that_is_no_objective_can_be_named() -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        entrants.entrants(["cdl"], config.load("kd"))
    *_, smooth = entrants.entrants(["label_smoothing"], config.load("kd"))
    assert smooth.alone
    assert smooth.recipe(config.load("kd"), 3).seed == 3
