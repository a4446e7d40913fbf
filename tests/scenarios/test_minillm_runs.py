"""Runs in which the student learns from what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.engine import small, small_texts
from tests.engine.killing import killed_and_resumed

from limbeck import api
from limbeck.errors import ConfigError
from limbeck.metrics import cost

MINILLM = "objective=[minillm]"
WRITING = "scenario.writing={share: 0.5, by: student, lag: 3, prompt: 4, teacher_mix: 0.2}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def test_rewards_and_language_modelling_take_turns_and_a_run_can_be_resumed(tmp_path: Path) -> None:
    sets = (MINILLM, WRITING, "scenario.epochs=1", "engine.log_every=1")
    folder = tmp_path / "whole"
    api.run(small_texts.recipe(tmp_path, *sets), out=folder, quiet=True)
    told = {tuple(line["terms"]) for line in small.lines(folder) if line["event"] == "step"}
    assert told == {("minillm.single", "minillm.long"), ("minillm.labels",)}
    found = json.loads((folder / "result.json").read_text())
    assert 1 < found["student"]["perplexity"] < 100
    assert found["fidelity"]["reverse_kl_interval"][0] < found["fidelity"]["reverse_kl"]
    asked = small_texts.recipe(tmp_path, *sets, "engine.checkpoint_seconds=0")
    small.assert_same(killed_and_resumed(asked, tmp_path / "killed", at=8), folder)


def test_without_texts_of_the_student_it_is_refused(tmp_path: Path) -> None:
    for writing in ("scenario.writing=null", "scenario.writing={by: teacher}"):
        asked = small_texts.recipe(tmp_path, MINILLM, writing)
        with pytest.raises(ConfigError, match="objective minillm learns from texts that the student writes"):
            asked.scenario.check(asked)
    alone = small_texts.recipe(
        tmp_path, "teacher={name: none}", "objective=[labels]", "data.tokenizer=characters", WRITING
    )
    with pytest.raises(ConfigError, match="has the teacher write but teacher is none"):
        alone.scenario.check(alone)
