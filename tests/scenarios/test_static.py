from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small
from torch import Tensor

from limbeck import api, config
from limbeck.config import Recipe
from limbeck.contracts import Batch, Course, Net, Outputs, Progress, Selection, Selector
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics import cost


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def recipe(*sets: str) -> Recipe:
    few = ("scenario.epochs=3", "scenario.teacher_epochs=2", "teacher.network.hidden=[32]")
    return config.load("kd", (*few, "engine.threads=1", "engine.checkpoint_seconds=1000", *sets))


def run(asked: Recipe, folder: Path) -> dict[str, Any]:
    return api.run(asked, out=folder, quiet=True).data


def test_a_teacher_is_trained_on_its_own_data_first(tmp_path: Path) -> None:
    found = run(recipe(), tmp_path / "run")
    assert found["protocol"]["teacher"] == {"epochs": 2, "data": "digits train", "samples": 1347}
    assert found["protocol"]["training_samples"] == 100
    assert found["teacher"]["accuracy"] > 30
    assert list(found["time"]["stages"]) == ["teacher", "train"]


def test_a_teacher_that_was_taught_the_same_way_is_taken_over(tmp_path: Path) -> None:
    caches = f"engine.cache_root={tmp_path / 'caches'}"
    first = run(recipe(caches), tmp_path / "first")
    second = run(recipe(caches, "scenario.optim.lr=0.001"), tmp_path / "second")
    events = [line["event"] for line in small.lines(tmp_path / "second")]
    assert "teacher_reused" in events
    assert second["teacher"]["nll"] == first["teacher"]["nll"]
    run(recipe(caches, "scenario.teacher_epochs=1"), tmp_path / "third")
    assert "teacher_reused" not in [line["event"] for line in small.lines(tmp_path / "third")]


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_killed_in_either_phase_and_resumed(tmp_path: Path, ema: str) -> None:
    class Killed(BaseException):
        pass

    asked = recipe(
        f"scenario.optim.ema={ema}", f"scenario.teacher_optim={{lr: 0.01, ema: {ema}}}",
        "engine.reuse_teachers=false",
    )  # fmt: skip
    run(asked, tmp_path / "whole")
    for number in (5, 27 * 2 + 3):
        steps, diagnoses = 0, Run.diagnoses

        def deadly(self: Run, at: Progress, number: int = number, diagnoses: Any = diagnoses) -> bool:
            nonlocal steps
            steps += 1
            if steps == number:
                raise Killed
            found: bool = diagnoses(self, at)
            return found

        folder = tmp_path / f"run{number}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "diagnoses", deadly)
            run(asked, folder)
        api.resume(folder, quiet=True)
        small.assert_same(folder, tmp_path / "whole")


def test_the_moving_average_takes_the_weights_place() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, schedule="constant", ema=0.75)
    optimizer = optim.build([{"params": [parameter]}])
    for _ in range(3):  # the weights go through 1, 2, 3; their average starts at 1
        parameter.grad = -torch.ones(1)
        optimizer.step()
        optim.average(optimizer)
    optim.settle(optimizer)
    assert parameter.item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3)


def test_held_out_samples_are_never_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    @dataclass(frozen=True, kw_only=True)
    class Watching(Selector):
        def prepare(self, course: Course) -> Selection:
            assert len(course.held_out) == 20
            assert not set(course.held_out.tolist()) & set(course.index.tolist())
            self.held.update(course.held_out.tolist())
            return Selection(self)

        def weights(
            self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
        ) -> Tensor | None:
            seen.update(batch.index.tolist())
            return None

    held: set[int] = set()
    monkeypatch.setattr(Watching, "held", held, raising=False)
    asked = recipe("scenario.validation=0.2")
    object.__setattr__(asked, "selector", Watching())
    monkeypatch.setattr(config, "to_plain", lambda _: {"name": "x"})
    found = run(asked, tmp_path / "run")
    assert found["protocol"]["validation_samples"] == 20
    assert len(held) == 20
    assert len(seen) == 80
    assert not held & seen


def test_a_probe_is_a_resumable_stage_and_what_it_found_is_kept(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Probing(Selector):
        def prepare(self, course: Course) -> Selection:
            correct: list[list[bool]] = []

            def look(net: Net, epoch: int) -> None:
                def ask() -> list[bool]:
                    said = [(net(b).logits.argmax(1) == b.labels) for b in course.batches(course.index)]
                    return [bool(x) for x in torch.cat(said)]

                correct.append(course.once(f"epoch{epoch}", ask))

            course.probe("one", 3, after=look)
            share = torch.tensor(correct).float().mean(0)

            class Weighted(Selection):
                def weights(
                    self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
                ) -> dict[str, Tensor]:
                    return {"kd": 0.5 + share[torch.searchsorted(course.index, batch.index)]}

            return Weighted(self)

    def start(folder: Path, at: int | None = None) -> None:
        asked = recipe("engine.reuse_teachers=false", "engine.checkpoint_seconds=0")
        object.__setattr__(asked, "selector", Probing())
        steps, diagnoses = 0, Run.diagnoses

        def deadly(self: Run, progress: Progress) -> bool:
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return diagnoses(self, progress)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "diagnoses", deadly)
            patch.setattr(config, "to_plain", lambda _: {"name": "x"})
            patch.setattr(config, "load", lambda _: asked)
            if (folder / "recipe.yaml").exists():
                api.resume(folder, quiet=True)
            else:
                run(asked, folder)

    start(tmp_path / "whole")
    teacher, probe = 27 * 2, 3 * 2
    for number in (teacher + 3, teacher + probe + 3):
        with pytest.raises(Killed):
            start(tmp_path / f"run{number}", number)
        start(tmp_path / f"run{number}")
        small.assert_same(tmp_path / f"run{number}", tmp_path / "whole")


def test_a_selection_that_goes_round_keeps_the_number_of_steps(tmp_path: Path) -> None:
    half = "selector={name: random, fraction: 0.3}"
    few, all_ = (
        run(recipe(half, f"scenario.equal_steps={equal}", "engine.log_every=1"), tmp_path / equal)
        for equal in ("false", "true")
    )
    steps = [
        sum(line["event"] == "step" and line["stage"] == "train" for line in small.lines(tmp_path / equal))
        for equal in ("false", "true")
    ]
    assert steps == [3, 6]
    assert few["protocol"]["equal_steps"] is False
    assert all_["protocol"]["equal_steps"] is True


def test_labels_that_are_hidden_are_not_read(tmp_path: Path) -> None:
    hidden = ("data.per_class=null", "data.labelled=4", "scenario.unlabelled_batch=64")
    found = run(recipe(*hidden), tmp_path / "run")
    assert found["protocol"]["labelled_samples"] == 40
    steps = [line for line in small.lines(tmp_path / "run") if line["event"] == "step"]
    assert steps[-1]["step"] == 3 * -(-(1347 - 40) // 64) - 1


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="unlabelled_batch is 8 but all samples of"):
        asked = recipe("scenario.unlabelled_batch=8")
        asked.scenario.check(asked)
    with pytest.raises(ConfigError, match=r"ema is 1\.5: allowed are values between 0 and 1"):
        recipe("scenario.optim.ema=1.5")
    with pytest.raises(ConfigError, match=r"validation is 1\.0: allowed are shares"):
        recipe("scenario.validation=1.0")


def test_a_teacher_of_as_many_other_classes_is_told_of(tmp_path: Path) -> None:
    part = "{{name: part, data: digits, groups: [[{}], [{}]]}}"
    for name, classes in (("other", (2, 3)), ("same", (0, 1))):
        sets = (f"data={part.format(0, 1)}", f"teacher.data={part.format(*classes)}")
        run(recipe(*sets, "scenario.epochs=1", "scenario.teacher_epochs=1"), tmp_path / name)
        told = [line["text"] for line in small.lines(tmp_path / name) if line["event"] == "warning"]
        assert any("learns the classes 2, 3, ... of" in text for text in told) == (name == "other")


def test_labels_that_are_all_there_or_all_hidden_are_no_mixture(tmp_path: Path) -> None:
    pool = "data={name: pool, data: digits, pool: digits}"
    shown = "data={name: part, data: digits, labelled: 200}"
    for data, named in ((pool, "no samples of digits"), (shown, "all samples of digits")):
        asked = recipe(data, "scenario.unlabelled_batch=8")
        with pytest.raises(ConfigError, match=f"unlabelled_batch is 8 but {named}"):
            asked.scenario.check(asked)
    with pytest.raises(ConfigError, match=r"validation is 0\.1 but no label of .* may be read"):
        run(recipe(pool, "scenario.validation=0.1", "objective=[kd]"), tmp_path / "run")


def test_a_stream_refuses_a_selector_that_looks_ahead(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ahead(Selector):
        def prepare(self, course: Course) -> Selection:
            return Selection(self)

    asked = small.recipe(tmp_path)
    object.__setattr__(asked, "selector", Ahead())
    with pytest.raises(ConfigError, match="selector Ahead looks at its data before the training"):
        asked.scenario.check(asked)


def test_a_teachers_largest_logits_are_enough(tmp_path: Path) -> None:
    whole, short = (
        run(recipe("objective.1.temperature=1", f"engine.cache_top_k={top}"), tmp_path / top)
        for top in ("null", "9")
    )
    logged = [line for line in small.lines(tmp_path / "9") if line["event"] == "teacher_shortened"]
    assert [(line["kept"], line["classes"]) for line in logged] == [(9, 10)]
    assert 0 < logged[0]["spread"] < 0.1
    assert (
        abs(whole["student"]["nll"] - short["student"]["nll"]) < 1e-3
    )  # one class left out: nothing is lost
    with pytest.raises(ConfigError, match="cache_top_k is 0: allowed are 1 and more"):
        recipe("engine.cache_top_k=0")
