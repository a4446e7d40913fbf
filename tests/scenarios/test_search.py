"""Runs that search among sub-networks: what is found, what a run leaves, what is refused."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.engine.killing import killed_and_resumed

from limbeck import api, plain
from limbeck.config import Recipe, build
from limbeck.contracts import Batch, Outputs
from limbeck.data.tokens import Rows, batch_of
from limbeck.engine.run import Run
from limbeck.errors import ConfigError, LimbeckError, NonFiniteError
from limbeck.metrics import cost
from limbeck.scenarios.search import Search
from limbeck.students.supernet import Place, SupernetLM

SPACES = [
    {"layers": [1], "hidden": [8, 12], "ratio": [1, 2], "heads": [1]},
    {"layers": [1, 2], "hidden": [12, 16], "ratio": [2], "heads": [1, 2]},
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


def recipe(place: Path, *sets: str) -> Recipe:
    """Twelve sub-networks of a random model of two layers; three rounds of four steps, then two alone."""
    given = small_texts.given(place) | {
        "student": {"name": "supernet", "spaces": SPACES, "others": 1},
        "objective": [{"name": "relations"}],
        "scenario": {
            "name": "search", "epochs": 3, "epoch_steps": 4, "batch_size": 8, "search_rows": 6,
            "eval_rows": 6, "optim": {"lr": 0.01}, "limit": 0.6, "cost": "parameters",
            "tuning": {"epoch_steps": 2},
        },
    }  # fmt: skip
    for item in sets:
        given = plain.override(given, item)
    return build(given)


@functools.cache
def finished(place: Path, *sets: str) -> Path:
    folder = place / f"run-{len(list(place.iterdir()))}"
    api.run(recipe(place, *sets), out=folder, quiet=True)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


ALONE = "scenario.tuning=null"


def test_the_best_below_the_limit_is_found(place: Path) -> None:
    found = figures(finished(place))
    search = found["search"]
    fitting = [c for c in search["candidates"] if c["cost"] < search["limit"]]
    assert search["limit"] == pytest.approx(0.6 * search["teacher"])
    assert 0 < len(fitting) < len(search["candidates"]) == 12
    assert search["chosen"] == min(fitting, key=lambda c: c["loss"])
    assert found["cost"]["student"]["parameters"] == search["chosen"]["cost"]
    assert found["cost"]["teacher"]["parameters"] == search["teacher"]
    assert found["scenario"] == "search"
    for number in (0, 1):
        own = [c["loss"] for c in search["candidates"] if c["space"] == number]
        told = search["spaces"][f"space{number}"]
        assert told == {"candidates": len(own), "mean": pytest.approx(sum(own) / len(own)), "best": min(own)}


def test_multiply_adds_are_those_of_the_student_that_is_cut_out(place: Path) -> None:
    found = figures(finished(place, "scenario.cost=multiply_adds"))
    assert found["cost"]["student"]["multiply_adds"] == found["search"]["chosen"]["cost"]
    assert found["cost"]["teacher"]["multiply_adds"] == found["search"]["teacher"]


def test_the_limit_may_be_a_number(place: Path) -> None:
    share = figures(finished(place))["search"]
    count = figures(finished(place, f"scenario.limit={share['limit']}"))["search"]
    assert count["limit"] == share["limit"] and count["chosen"] == share["chosen"]


def test_the_search_reads_no_label_and_nothing_of_the_test(place: Path) -> None:
    own = figures(finished(place))["search"]
    assert figures(finished(place, "scenario.eval_rows=2"))["search"] == own


def test_every_sub_network_comes_nearer_to_the_teacher(place: Path) -> None:
    short, long = (
        {str(c | {"loss": 0}): c["loss"] for c in figures(finished(place, *sets))["search"]["candidates"]}
        for sets in (
            ("scenario.epochs=1", "scenario.epoch_steps=1", ALONE),
            (ALONE, "scenario.epoch_steps=20"),
        )
    )
    assert all(long[name] < short[name] for name in short)


@pytest.mark.parametrize(
    "sets", [("student.ends=false",), ("objective=[{name: labels}, {name: divergence}]",)]
)
def test_other_steps_and_objectives_are_searched_in_too(place: Path, sets: tuple[str, ...]) -> None:
    search, usual = (figures(finished(place, *more))["search"] for more in (sets, ()))
    assert search["chosen"] == min(
        (c for c in search["candidates"] if c["cost"] < search["limit"]), key=lambda c: c["loss"]
    )
    assert [c["cost"] for c in search["candidates"]] == [c["cost"] for c in usual["candidates"]]
    assert all(a["loss"] != b["loss"] for a, b in zip(search["candidates"], usual["candidates"], strict=True))


def test_chance_is_the_seeds(place: Path) -> None:
    drawn = [figures(finished(place, "scenario.pick=chance", ALONE, f"seed={s}"))["search"] for s in range(4)]
    assert all(one["chosen"]["cost"] < one["limit"] for one in drawn)
    assert len({str(one["chosen"] | {"loss": 0}) for one in drawn}) > 1
    again = build(plain.read(finished(place, "scenario.pick=chance", ALONE, "seed=3") / "recipe.yaml"))
    folder = api.run(again, out=place / "again", quiet=True).folder
    assert figures(folder)["search"] == drawn[3]


def test_what_is_found_is_trained_on_alone(place: Path) -> None:
    tuned, zero = finished(place), finished(place, ALONE)
    assert figures(tuned)["search"] == figures(zero)["search"]
    assert list(figures(tuned)["time"]["stages"]) == ["train", "tune"]
    assert list(figures(zero)["time"]["stages"]) == ["train"]
    ours, theirs = small.weights(tuned), small.weights(zero)
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours)
    long = finished(place, "scenario.tuning={epoch_steps: 30, optim: {lr: 0.02}}")
    assert figures(long)["student"]["nll"] < figures(zero)["student"]["nll"]
    taught = finished(place, "scenario.tuning={epoch_steps: 30, objective: [{name: divergence}]}")
    assert figures(taught)["fidelity"]["kl"] < figures(zero)["fidelity"]["kl"]


@pytest.mark.parametrize("sets", [(), (ALONE,)], ids=["tuned", "as found"])
def test_the_student_is_a_folder_of_transformers(place: Path, sets: tuple[str, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = finished(place, *sets)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "student")
    chosen = figures(folder)["search"]["chosen"]
    assert sum(p.numel() for p in network.parameters()) == chosen["cost"]
    assert network.config.num_hidden_layers == chosen["layers"]
    ids = torch.tensor([tokenizer("3 x 4 = 12\n")["input_ids"]])
    rows = Rows("", ids[:, :-1], ids[:, 1:], None, torch.zeros(1), ("all",))
    with torch.no_grad():
        said = api.load_student(folder)(batch_of(rows, torch.tensor([0]))).logits
        torch.testing.assert_close(said, network(ids[:, :-1]).logits[0])


def test_a_super_network_learns_without_a_search_too(place: Path) -> None:
    folder = finished(place, "scenario={name: language, epochs: 1, batch_size: 8, eval_rows: 6}")
    found = figures(folder)
    assert list(found["nested"]) == [f"space{n}.{end}" for n in (0, 1) for end in ("smallest", "largest")]
    assert found["nested"]["space1.largest"]["nll"] == pytest.approx(found["student"]["nll"], rel=1e-5)
    assert {path.name for path in (folder / "student").iterdir() if path.is_dir()} == set(found["nested"])
    assert sum(w.numel() for w in small.weights(folder).values()) == found["cost"]["student"]["parameters"]


@pytest.mark.parametrize("at", [3, 9, 14, 15, 16, 17])
def test_killed_and_resumed(place: Path, tmp_path: Path, at: int) -> None:
    """In the training of all, around the search, and in the training of the found one."""
    again = killed_and_resumed(recipe(place, "engine.checkpoint_seconds=0"), tmp_path / "run", at=at)
    small.assert_same(again, finished(place))
    assert figures(again)["search"] == figures(finished(place))["search"]


def test_a_teacher_that_learns_hands_its_weights_over(place: Path) -> None:
    learns = (
        "teacher={name: trained, network: {name: llama, layers: 2, width: 16, heads: 2}}",
        "data.tokenizer=characters", "scenario.epoch_steps=1", "scenario.epochs=1", ALONE,
        "student.spaces=[{layers: [2], hidden: [16], ratio: [3], heads: [2]}]", "scenario.limit=1e9",
        "scenario.optim.lr=1e-9", "scenario.teacher_optim={lr: 0.01}", "scenario.teacher_epochs=20",
    )  # fmt: skip
    found = figures(finished(place, *learns))
    assert found["student"]["nll"] == pytest.approx(found["teacher"]["nll"], rel=1e-4)
    assert found["search"]["chosen"]["loss"] < 1e-9


def test_evaluation_leaves_the_super_network_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = Search.losses, []

    def watched(self: Search, pair: Any, desk: Any, student: SupernetLM) -> list[float]:
        before = {name: value.clone() for name, value in student.state_dict().items()}
        found = own(self, pair, desk, student)
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
        assert own(self, pair, desk, student) == found
        seen.append(len(found))
        return found

    monkeypatch.setattr(Search, "losses", watched)
    api.run(recipe(place, ALONE), out=place / "watched", quiet=True)
    assert seen == [12]


def test_a_spoilt_sub_network_stops_the_step(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No sub-network of that step has learnt: the checkpoint is from before it."""
    own, calls = SupernetLM.within, 0

    def within(self: SupernetLM, where: Place, batch: Batch, taps: tuple[str, ...] = ()) -> Outputs:
        nonlocal calls
        outputs = own(self, where, batch, taps)
        if not self.training or where.architecture != self.choice.spaces[0].smallest:
            return outputs
        calls += 1
        factor = torch.nan if calls == 3 else 1.0
        return replace(outputs, features={k: factor * v for k, v in outputs.features.items()})

    monkeypatch.setattr(SupernetLM, "within", within)
    with pytest.raises(NonFiniteError, match=re.escape("loss term 'space0.smallest.relations' is nan")):
        api.run(recipe(place), out=tmp_path / "run", quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    monkeypatch.setattr(api, "write_page", lambda _: None)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", finished(place))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["scenario.limit=0"], "limit is 0.0: allowed are parts of the teacher's cost, or numbers above 1"),
        (["scenario.search_rows=0"], "search_rows is 0: allowed are values of at least 1"),
        (["scenario.pick=worst"], "pick is 'worst' but must be 'best' or 'chance'"),
        (["scenario.cost=seconds"], "cost is 'seconds' but must be 'multiply_adds' or 'parameters'"),
        (["scenario.tuning={objective: []}"], "objective is an empty list: name at least one objective, or"),
        (["scenario.tuning={epochs: 0}"], "epochs is 0: allowed are values of at least 1"),
        (["student.spaces=[]"], "spaces is empty: name at least one"),
        (["student.spaces=[{layers: [2, 1], hidden: [8], ratio: [2], heads: [1]}]"], "layers is"),
    ],
)
def test_fields_out_of_range(place: Path, sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe(place, *sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["scenario.limit=10"], "limit is 10.0 but no architecture costs less (the cheapest costs"),
        (["scenario.limit=0.01"], "but no architecture costs less (the cheapest costs"),
        (["student={name: llama, layers: 1, width: 8, heads: 2}"], "which holds nothing to search in: "),
        (["teacher={name: none}", "data.tokenizer=characters"], "is made of its teacher's weights, "),
        (["student.spaces=[{layers: [3], hidden: [8], ratio: [2], heads: [1]}]"], "layers is 3 but must be "),
        (["objective=[{name: relations, heads: 99}]"], "features but must have at least heads = 99"),
        (["objective=[{name: relations, student_taps: [a, b, c]}]"], "no tap 'a' in LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_a_step(
    place: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(LimbeckError, match=re.escape(message)) as caught:
        api.run(recipe(place, *sets), out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    lines = tmp_path / "run" / "metrics.jsonl"
    assert not lines.exists() or '"step"' not in lines.read_text()


def test_a_run_that_is_stopped_by_its_limit_never_trains(place: Path, tmp_path: Path) -> None:
    entered: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "enter", lambda self, stage, turns: entered.append(stage))
        with pytest.raises(ConfigError, match="raise the limit"):
            api.run(recipe(place, "scenario.limit=10"), out=tmp_path / "run", quiet=True)
    assert entered == []
