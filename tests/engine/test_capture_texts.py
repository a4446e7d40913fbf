"""The cache of a language model's most probable tokens: cut off and gone on, on disk, and what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.engine.killing import Killed

from limbeck import api
from limbeck.engine import cache
from limbeck.engine.run import Run
from limbeck.errors import Interrupted
from limbeck.metrics import cost
from limbeck.scenarios import pair
from limbeck.scenarios.language import Desk
from limbeck.scenarios.pair import Pair

TOP = "engine.cache_top_k=4"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nothing cut off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write_page", lambda _: None)
        patch.setattr(cost, "latency", lambda _: 0.0)
        api.run(small_texts.recipe(place, TOP), out=place / "whole", quiet=True)
    return place / "whole"


class Asked:
    """Counts what the cache is filled with, and does something at one place of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        self.at: dict[int, Any] = {}
        own = pair.token_rows

        def counted(outputs: Any, batch: Any, top: int | None) -> Any:
            if len(self.rows) in self.at:
                self.at.pop(len(self.rows))()
            self.rows.append(batch.index.tolist())
            return own(outputs, batch, top)

        monkeypatch.setattr(pair, "token_rows", counted)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def kill() -> None:
    raise Killed


def header(folder: Path) -> dict[str, Any]:
    (found,) = folder.rglob("header.json")
    told: dict[str, Any] = json.loads(found.read_text())
    return told


def test_killed_while_it_is_filled(
    place: Path, whole: Path, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FLUSH_SECONDS", -1)
    asked.at = {3: kill}
    with pytest.raises(Killed):
        api.run(small_texts.recipe(place, TOP), out=tmp_path / "run", quiet=True)
    assert (header(tmp_path)["rows"], header(tmp_path)["complete"]) == (24, False)
    api.resume(tmp_path / "run", quiet=True)
    flat = [row for rows in asked.rows for row in rows]
    assert flat == sorted(set(flat)), "nothing is asked twice"
    small.assert_same(whole, tmp_path / "run")


def test_stopped_while_it_is_filled(
    place: Path, whole: Path, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    monkeypatch.setattr(Run, "__enter__", lambda self: runs.append(self) or self)
    monkeypatch.setattr(Run, "__exit__", lambda self, *_: self._log.close())
    asked.at = {2: lambda: runs[0].stop.set()}
    with pytest.raises(Interrupted, match="while the teacher was asked; continue with: limbeck resume"):
        api.run(small_texts.recipe(place, TOP), out=tmp_path / "run", quiet=True)
    assert header(tmp_path)["rows"] == 24, "what was said is kept"
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(whole, tmp_path / "run")


def test_a_big_one_stays_on_disk(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    api.run(small_texts.recipe(place, TOP), out=tmp_path / "run", quiet=True)
    small.assert_same(whole, tmp_path / "run")


def test_what_it_lacks_stands_in_the_result(place: Path, whole: Path, tmp_path: Path) -> None:
    told = json.loads((whole / "result.json").read_text())["teacher_cache"]
    recipe = small_texts.recipe(place)
    with Run(tmp_path / "run", recipe.engine, recipe.seed, quiet=True) as run:
        desk = Desk(recipe.scenario, recipe, run)
        both: Pair = desk.pair
        shares = []
        for batch in desk.learning.in_order(8).epoch(0):
            said = both.ask_live(batch)
            assert said.hidden is not None and said.unembedding is not None
            shares.append(said.unembedding.logits(said.hidden).softmax(1))
    left = 1 - torch.cat(shares).topk(4, dim=1).values.sum(1)
    assert told == {"kept": 4, "tokens": 16, "left_out": pytest.approx(float(left.mean()), rel=1e-4)}
    assert "teacher_cache" not in json.loads((finished(place, tmp_path) / "result.json").read_text())


def finished(place: Path, folder: Path) -> Path:
    api.run(small_texts.recipe(place), out=folder / "all", quiet=True)
    return folder / "all"
