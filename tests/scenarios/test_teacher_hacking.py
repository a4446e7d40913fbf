"""What must be true of the experiment with an oracle."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.engine.killing import killed_and_resumed

from limbeck import api
from limbeck.config import Recipe
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics import cost
from limbeck.metrics.hacking import hacking_report, sequence_distance
from limbeck.report.compare import compare
from limbeck.scenarios.teacher_hacking import OracleDesk, TeacherHacking, points

NET = "{name: llama, layers: 1, width: 8, heads: 2}"
PLAN = (
    "scenario={name: teacher_hacking, epochs: 4, epoch_steps: 3, batch_size: 4, texts: 12, prompts: 6, "
    f"prompt: 4, evaluations: 3, oracle: {NET}, oracle_epochs: 6, optim: {{lr: 0.02}}, eval_rows: 6}}",
    f"teacher={{name: trained, network: {NET}}}", "data.tokenizer=characters", "objective=[divergence]",
)  # fmt: skip
OFFLINE = "scenario.writing={share: 1, by: teacher, replays: 1}"
ONLINE = "scenario.writing={share: 1, by: student}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracles")


def recipe(place: Path, *sets: str) -> Recipe:
    return small_texts.recipe(place, *PLAN, *sets)


@functools.cache
def finished(place: Path, *sets: str) -> Path:
    folder = place / f"run-{len(list(place.iterdir()))}"
    api.run(recipe(place, *sets), out=folder, quiet=True)
    return folder


def hacking(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())["hacking"]
    return found


def desk(place: Path, tmp_path: Path, *sets: str) -> OracleDesk:
    asked = recipe(place, *sets)
    plan = asked.scenario
    assert isinstance(plan, TeacherHacking)
    run = Run(tmp_path / "desk", asked.engine, 0, quiet=True)
    return OracleDesk(plan, asked, run)


def test_what_was_seen_agrees_with_itself(place: Path) -> None:
    found = hacking(finished(place, OFFLINE))
    assert found["steps"] == [0, 3, 6, 12]
    report = hacking_report(found["proxy"], found["golden"], 0.1)
    assert (found["rise"], found["hacked"]) == (report.rise, report.hacked)
    assert found["golden_lowest"] == min(found["golden"])
    assert found["proxy_there"] == found["proxy"][report.argmin]
    for (low, high), value in zip(found["golden_interval"], found["golden"], strict=True):
        assert low <= value <= high


def test_arms_differ_in_the_texts_alone(place: Path) -> None:
    folders = [finished(place, *arm) for arm in ((OFFLINE,), (ONLINE,), ())]
    curves = [hacking(folder) for folder in folders]
    assert len({c["golden_of_teacher"] for c in curves}) == 1
    assert len({(c["golden_start"], c["proxy_start"]) for c in curves}) == 1
    assert len({c["golden_last"] for c in curves}) == 3
    for folder in folders:
        steps = [e["step"] for e in small.lines(folder) if e["event"] == "step" and e["stage"] == "train"]
        assert max(steps) == 11


def test_seeds_answer_one_question(place: Path) -> None:
    folders = [finished(place, OFFLINE), finished(place, OFFLINE, "seed=1")]
    assert compare(folders).methods[0].spreads["hacking.golden_last"].n == 2


def test_measuring_changes_nothing_of_the_training(place: Path) -> None:
    often = finished(place, OFFLINE, "scenario.evaluations=2")
    one, other = small.weights(finished(place, OFFLINE)), small.weights(often)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert hacking(often)["golden_last"] == hacking(finished(place, OFFLINE))["golden_last"]


@pytest.mark.parametrize("at", [20, 33, 41, 46])
def test_killed_and_resumed(place: Path, tmp_path: Path, at: int) -> None:
    """While the teacher learns, while the student begins, and in the distillation."""
    asked = recipe(place, OFFLINE, "engine.checkpoint_seconds=0")
    small.assert_same(killed_and_resumed(asked, tmp_path / "run", at=at), finished(place, OFFLINE))


def test_oracle_and_teacher_are_taken_from_another_arm(place: Path) -> None:
    kept = ("engine.reuse_teachers=true", f"engine.cache_root={place / 'shared'}")
    first, again = finished(place, OFFLINE, *kept), finished(place, ONLINE, *kept)
    assert hacking(first) == hacking(finished(place, OFFLINE))
    assert hacking(again) == hacking(finished(place, ONLINE))
    reused = [e["stage"] for e in small.lines(again) if e["event"] == "teacher_reused"]
    assert reused == ["oracle", "teacher", "start"]


def test_the_distance_is_that_of_whole_logits(place: Path, tmp_path: Path) -> None:
    here = desk(place, tmp_path)
    assert here.pair.teacher is not None
    here.write(here.oracle, ("golden",))
    here.write(here.pair.teacher, ("proxy",))
    for name, reference in (("golden", here.oracle), ("proxy", here.pair.teacher)):
        texts: Any = here.told[name]
        said = [net.network(texts.ids).logits.detach() for net in (reference, here.pair.student)]
        wanted = sequence_distance(said[0], said[1], texts.following != -100)
        assert float(here.distance(name, here.pair.student).mean()) == pytest.approx(float(wanted), rel=1e-4)
        assert float(here.distance(name, reference).sum()) == pytest.approx(0, abs=1e-5)


def test_prompts_are_disjoint_and_texts_are_theirs(place: Path, tmp_path: Path) -> None:
    here = desk(place, tmp_path)
    texts, prompts = (set(here.parts[name].tolist()) for name in ("texts", "prompts"))
    assert len(texts) == 12 and len(prompts) == 6 and not texts & prompts
    assert torch.equal(here.parts["golden"], here.parts["proxy"])
    here.write(here.oracle, ("texts", "golden"))
    for name, rows in (("texts", here.human.rows), ("golden", here.test_rows)):
        written: Any = here.told[name]
        index = here.parts[name]
        long = (rows.following[index, :4] != -100).all(1)  # others have shorter prompts
        assert long.sum() > len(index) / 2
        assert torch.equal(written.ids[long, :4], rows.ids[index[long], :4])
        following = written.following[long]
        assert (following[:, :3] == -100).all() and (following[:, 3] != -100).all()


def test_measurements_are_at_equal_ratios() -> None:
    assert points(8, 4) == [0, 1, 2, 4, 8]
    assert points(3, 10) == [0, 1, 2, 3]
    assert points(1, 2) == [0, 1]


def test_what_cannot_be_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tolerance is -1"):
        TeacherHacking(tolerance=-1)
    with pytest.raises(ConfigError, match="prompts is 0: allowed are values of at least 1"):
        TeacherHacking(prompts=0)
    frozen = f"teacher={{name: causal_lm, model: '{small_texts.model(place)}'}}"
    asked = recipe(place, frozen, "data.tokenizer=null")
    with pytest.raises(ConfigError, match="it must learn the oracle's texts"):
        asked.scenario.check(asked)
    with pytest.raises(ConfigError, match="texts and prompts are 10006 together but the data has"):
        desk(place, tmp_path, "scenario.texts=10000")
    with pytest.raises(ConfigError, match="prompt is 24 but rows have 24 tokens"):
        desk(place, tmp_path, "scenario.prompt=24")
    for given, told in (
        ("student={name: elastic}", "it must begin with what the oracle wrote"),
        (
            f"scenario.oracle={{name: causal_lm, model: '{small_texts.model(place)}'}}",
            "but the oracle was trained with",
        ),
    ):
        asked = recipe(place, given, "data.tokenizer=bpe:300")
        with pytest.raises(ConfigError, match=told):
            asked.scenario.check(asked)
