"""What a user gets wrong, through the command line: one line that says what, where, what is allowed and the
fix; exit code 2; and nothing of a run is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine import small, toy

from limbeck import api, cli, losses, plain
from limbeck.data.digits import Digits
from limbeck.data.images import Splits, from_arrays
from limbeck.engine import state
from limbeck.engine.run import Run
from limbeck.nets.small import MLP
from limbeck.selectors.random import Random

Said = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nets")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "caches"))


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> str:
    """The path of a small recipe that works."""
    path = tmp_path / "small.yaml"
    path.write_text(plain.write(small.given(place, "scenario.epochs=1")))
    return str(path)


def call(*arguments: str) -> int:
    try:
        cli.main([*arguments, "--json"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a command that must fail; gives its one line."""

    def run(*arguments: str) -> str:
        code = call(*arguments)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        *warnings, last = err.splitlines()
        assert all(line.startswith("warning: ") for line in warnings), err
        assert last.startswith("limbeck: ")
        return last

    return run


def sets(*items: str) -> list[str]:
    return [word for item in items for word in ("--set", item)]


# Names and values: refused before anything is built or written

WORDS: dict[str, tuple[list[str], str]] = {
    "field": (sets("student.prompt.pool=3"), r"unknown field 'prompt' at student: did you mean 'prompts'\?"),
    "field of a choice": (
        sets("objective.kd.temprature=3"),
        r"unknown field 'temprature' at objective\.1: did you mean 'temperature'\?",
    ),
    "data set": (sets("data=digit"), r"unknown data set 'digit' at data: did you mean 'digits'\?"),
    "teacher": (
        sets("teacher=prompted_vot"),
        r"unknown teacher 'prompted_vot'.* did you mean 'prompted_vit'\?",
    ),
    "objective": (sets("objective=[labels, dk]"), r"unknown objective 'dk'.* choose from .*dkd.*kd"),
    "prompt learner": (
        sets("student.prompts=codda"),
        r"unknown prompt learner 'codda'.* did you mean 'coda'\?",
    ),
    "scenario": (sets("scenario=continul"), r"unknown scenario 'continul'.* did you mean 'continual'\?"),
    "selector": (sets("selector=randon"), r"unknown selector 'randon'.* did you mean 'random'\?"),
    "model": (
        sets("student.backbone=vit_smal_patch16_224"),
        r"unknown network 'vit_smal_patch16_224': did you mean 'vit_small_patch16_224'",
    ),
    "a folder that holds no model": (
        sets("student.backbone=local-dir:/nowhere"),
        r"no network at /nowhere: it",
    ),
    "a wrong type": (sets("scenario.epochs=many"), r"scenario\.epochs is 'many' but must be a valid integer"),
    "a wrong word": (
        sets("scenario.schedule=jiont"),
        r"scenario\.schedule is 'jiont' but must be .*'joint': did you mean 'joint'\?",
    ),
    "out of range": (
        sets("scenario.optim.lr=-1"),
        r"scenario\.optim: lr is -1.*: allowed are values above 0",
    ),
    "odd KD prompts": (sets("student.kd_prompts.length=3"), r"kd_prompts\.length is 3 but must be even"),
    "a class order with a class twice": (
        sets("scenario.class_order=[0, 1, 2, 3, 4, 5, 6, 7, 8, 8]"),
        r"scenario\.class_order is .* but must be .* each of 0\.\.9 once",
    ),
    "a class order that is too short": (
        sets("scenario.class_order=[1, 0]"),
        r"scenario\.class_order is .* but must be .* each of 0\.\.9 once",
    ),
    "more tasks than classes": (sets("scenario.tasks=11"), r"scenario\.tasks is 11 but must lie in 1\.\.10"),
    "sizes that do not sum": (
        sets("scenario.sizes=[3, 3]"),
        r"scenario\.sizes is \[3, 3\] but must be 2 numbers",
    ),
    "an empty task": (
        sets("scenario.sizes=[10, 0]"),
        r"scenario\.sizes is \[10, 0\] but must be 2 numbers of at",
    ),
    "a batch that no task fills": (
        sets("scenario.batch_size=300"),
        r"scenario\.batch_size is 300 but task 0 has only \d+ samples: use a smaller one, or drop_last=false",
    ),
    "a teacher that nobody listens to": (
        sets("objective=[labels]"),
        r"no objective listens to it: add one such as kd, or set teacher to none",
    ),
    "no teacher": (
        sets("teacher=none"),
        r"objective 'kd' needs a teacher but teacher is none: name a teacher",
    ),
    "joint without a teacher": (
        sets("teacher=none", "objective=[labels]", "scenario.schedule=joint"),
        r"scenario\.schedule is joint but there is no teacher: name one, or change it",
    ),
    "data that cannot be had": (
        sets("data={name: cifar100, root: /nowhere}"),
        r"data\.root names '/nowhere', which is not there: give an existing",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_wrong_word_is_refused_before_anything_is_written(
    recipe: str, tmp_path: Path, refused: Said, case: str
) -> None:
    arguments, message = WORDS[case]
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *arguments)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe(refused: Said) -> None:
    assert "unknown recipe 'cdl-kdpp': did you mean 'cdl-kdp'? choose from" in refused("run", "cdl-kdpp")


# Networks that do not fit


def wide(place: Path) -> str:
    """A teacher for images of another size."""
    path = place / "wide"
    if not path.exists():
        shutil.copytree(small.backbone(place, "large").removeprefix("local-dir:"), path)
        config = (path / "config.json").read_text().replace("[1, 8, 8]", "[1, 16, 16]")
        (path / "config.json").write_text(config.replace('"img_size": 8', '"img_size": 16'))
    return f"local-dir:{path}"


def test_a_teacher_for_other_images(recipe: str, place: Path, tmp_path: Path, refused: Said) -> None:
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"teacher.backbone={wide(place)}"))
    assert "the teacher reads 1 x 16 px images and the student 1 x 8 px: choose networks of one" in said
    assert not (tmp_path / "run").exists()


MISFITS = {
    "prompts wider than the query": (
        ["teacher.prompts.pool=14"],
        r"pool is 14 but no more components can be orthogonal than the query has dimensions, 12: lower",
    ),
    "a pool that the tasks do not divide": (
        ["student.prompts.pool=5"],
        r"prompts\.pool is 5 but must be a multiple of the 2 tasks",
    ),
    "blocks that are not there": (
        ["student.prompts.blocks=[2]"],
        r"prompts\.blocks is \[2\] but must be distinct numbers from 0 to 1",
    ),
    "a mapping from a narrow teacher": (
        [*small.JOINT, "student.prompt_map.components=17"],
        r"components is 17 but no more than the teacher's width, 16, can be orthogonal",
    ),
    "a mapping where the teacher has nothing": (
        [*small.JOINT, "student.prompt_map.blocks=[1]"],
        r"prompt_map\.blocks has \[1\], where the teacher has no prompts: choose from \[0\]",
    ),
    "a tap that is not there": (
        ["objective=[labels, {name: fitnets, student_tap: blocks.7}]", "student.kd_prompts=null"],
        r"blocks\.7",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit(recipe: str, tmp_path: Path, refused: Said, case: str) -> None:
    changes, message = MISFITS[case]
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(*changes))
    assert re.search(message, said), said


def test_a_teacher_of_other_classes(recipe: str, tmp_path: Path, refused: Said) -> None:
    """Seven classes against the ten of the data, in a plain distillation."""
    (tmp_path / "seven.py").write_text(
        "from torch import nn\ndef net(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    images = "images: {channels: 1, size: 8, mean: [0.0], std: [1.0]}"
    nets = {
        who: f"{who}={{name: module, target: 'seven:net', kwargs: {{classes: {classes}}}, {images}}}"
        for who, classes in (("teacher", 7), ("student", 10))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        plan = "scenario={name: static, epochs: 1, batch_size: 32}"
        said = refused(
            "run", recipe, "--out", str(tmp_path / "run"), *sets(nets["teacher"], nets["student"], plan)
        )
    assert re.search(r"\b7\b.*\b10\b|\b10\b.*\b7\b", said), said


# A static pair that does not fit

STATIC: dict[str, tuple[list[str], str]] = {
    "a tap that is not there": (
        ["objective=[labels, {name: sp, student_tap: stages.9, teacher_tap: stages.2}]"],
        r"no tap 'stages\.9' in ConvNet: did you mean 'stages\.\d'\? stages holds 0, 1, 2",
    ),
    "a teacher's tap that is not there": (
        ["objective=[labels, {name: sp, student_tap: stages.2, teacher_tap: pol}]"],
        r"no tap 'pol' in ConvNet: did you mean 'pool'\? ConvNet holds stages, pool, head",
    ),
    "features that cannot be aligned": (
        ["objective=[labels, {name: fitnets, student_tap: stages.2, teacher_tap: stages.0}]"],
        r"the student's map is 2 high but the teacher's is 8: only equal, larger or half as high can be",
    ),
    "features that are too small": (
        ["objective=[labels, {name: trg, student_tap: stages.2, teacher_tap: stages.2, patch: 3}]"],
        r"patch is 3 but the maps are \[2, 2\]: cut smaller patches, or tap earlier layers",
    ),
    "more taps on one side": (
        ["objective=[labels, {name: vid, student_taps: [stages.0, stages.1], teacher_taps: [stages.0]}]"],
        r"student_taps names 2 layers but teacher_taps names 1: name as many in both",
    ),
    "one class": (
        ["data={name: part, data: digits, groups: [[3]]}"],
        r"data: groups must be at least two",
    ),
}


@pytest.mark.parametrize("case", STATIC)
def test_a_static_pair_that_does_not_fit(tmp_path: Path, refused: Said, case: str) -> None:
    """Found before the teacher is trained."""
    changes, message = STATIC[case]
    said = refused("run", "kd-cnn", "--out", str(tmp_path / "run"), *sets(*changes))
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not small.lines(tmp_path / "run")


def test_a_static_set_of_one_class(tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Digits.load

    def threes(data: Digits) -> Splits:
        parts = []
        for split in (load(data).train, load(data).test):
            own = split.labels.numpy() == 3
            images, labels = np.asarray(split.images)[own], np.zeros(int(own.sum()), np.int64)
            parts.append(from_arrays("threes", images, labels, ["3"], licence="none", source="none"))
        return Splits(*parts)

    monkeypatch.setattr(Digits, "load", threes)
    said = refused("run", "kd", "--out", str(tmp_path / "run"), "--set", "data={name: digits}")
    assert "the data has 1 class: a classifier needs at least 2" in said
    assert not (tmp_path / "run").exists()


def test_a_static_teacher_of_other_classes(tmp_path: Path, refused: Said) -> None:
    five = "{name: part, data: digits, groups: [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]}"
    said = refused("run", "kd", "--out", str(tmp_path / "run"), *sets(f"teacher.data={five}"))
    assert "the teacher has 5 classes and the student 10: give both a classifier for the same" in said


def test_a_static_teacher_whose_weights_are_nan(tmp_path: Path, refused: Said) -> None:
    net = MLP(64, [4], 10)
    weights = {**net.state_dict(), "head.bias": torch.full((10,), torch.nan)}
    save_file(weights, tmp_path / "teacher.safetensors")
    teacher = (
        f"{{name: network, network: {{name: mlp, hidden: [4]}}, weights: {tmp_path}/teacher.safetensors}}"
    )
    said = refused("run", "kd", "--out", str(tmp_path / "run"), *sets(f"teacher={teacher}"))
    assert "the teacher's output is not finite before any training: mend its weights" in said
    assert not small.lines(tmp_path / "run")


def test_nothing_is_left_by_the_selector(
    tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Random, "indices", lambda *_: torch.arange(0))
    quickly = sets("scenario.teacher_epochs=1", "selector={name: random, fraction: 0.5}")
    said = refused("run", "kd", "--out", str(tmp_path / "run"), *quickly)
    assert "the selector left no sample in epoch 0: let it keep more" in said


@pytest.mark.parametrize("named", [False, True])
def test_all_weights_are_zero(
    tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    def none(_self: Any, batch: Any, *_: Any) -> Any:
        zero = torch.zeros(len(batch.index))
        return {"labels": zero, "kd": zero} if named else zero

    monkeypatch.setattr(Random, "weights", none)
    quickly = sets("scenario.teacher_epochs=1", "selector={name: random, fraction: 1.0}")
    said = refused("run", "kd", "--out", str(tmp_path / "run"), *quickly)
    assert "the selector gives all samples of a batch the weight 0, at epoch 0, step 0: nothing" in said


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kdd": 1.0}, r"unknown objective 'kdd' at the selector's weights: did you mean 'kd'\? choose from"),
        ({"kd": -1.0}, r"gives a weight that is negative or no number, at epoch 0, step 0: allowed are"),
        ({"kd": torch.nan}, r"gives a weight that is negative or no number"),
        ({"labels": torch.inf, "kd": 1.0}, r"gives a weight that is negative or no number"),
    ],
)
def test_weights_that_are_no_weights(
    tmp_path: Path,
    refused: Said,
    monkeypatch: pytest.MonkeyPatch,
    weights: dict[str, float],
    message: str,
) -> None:
    def given(_self: Any, batch: Any, *_: Any) -> Any:
        return {name: torch.full((len(batch.index),), value) for name, value in weights.items()}

    monkeypatch.setattr(Random, "weights", given)
    quickly = sets("scenario.teacher_epochs=1", "selector={name: random, fraction: 1.0}")
    assert re.search(message, refused("run", "kd", "--out", str(tmp_path / "run"), *quickly))


@pytest.mark.parametrize("named", [True, False], ids=["the other named", "the other left out"])
def test_weights_of_zero_for_one_objective_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    def labels_alone(_self: Any, batch: Any, *_: Any) -> Any:
        one = torch.ones(len(batch.index))
        return {"kd": 0 * one} | ({"labels": one} if named else {})

    monkeypatch.setattr(Random, "weights", labels_alone)
    quickly = sets("scenario.teacher_epochs=1", "scenario.epochs=1", "selector={name: random, fraction: 1.0}")
    assert call("run", "kd", "--out", str(tmp_path / "run"), *quickly) == 0


# Data that are wrong


def spoilt(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
) -> None:
    """The digits as somebody else would have prepared them."""
    load = Digits.load

    def loaded(data: Digits) -> Splits:
        train, test = load(data).train, load(data).test
        pixels, labels = change(np.asarray(train.images) / 255.0, train.labels.numpy().copy())
        mine = from_arrays("my digits", pixels, labels, train.classes, licence="none", source="none")
        return Splits(mine, replace(test, classes=mine.classes))

    monkeypatch.setattr(Digits, "load", loaded)


def with_nan(pixels: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    pixels[17, 3, 3] = np.nan
    return pixels, labels


def with_label_ten(pixels: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    labels[4] = 10
    return pixels, labels


def without_threes(pixels: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    return pixels[labels != 3], labels[labels != 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, r"my digits: image 17 has NaN or infinite pixels \(1 such\): remove or mend it"),
        (with_label_ten, r"my digits: label 10 is out of range 0\.\.9 \(10 classes\): renumber the labels"),
        (without_threes, r"task \d \(classes 3\) has no train samples in my digits: use fewer tasks"),
    ],
)
def test_data_that_are_wrong(
    recipe: str, tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    spoilt(monkeypatch, change)
    ten = sets("scenario.tasks=10", "student.prompts.pool=10", "teacher.prompts.pool=10")
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *ten)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


# Weights that are wrong


def copy_of(place: Path, tmp_path: Path, size: str) -> Path:
    found = Path(small.backbone(place, size).removeprefix("local-dir:"))
    return Path(shutil.copytree(found, tmp_path / "net"))


def test_nan_in_the_teachers_weights(recipe: str, place: Path, tmp_path: Path, refused: Said) -> None:
    net = copy_of(place, tmp_path, "large")
    weights = load_file(net / "model.safetensors")
    weights["blocks.2.mlp.fc2.bias"][3] = torch.nan
    save_file(weights, net / "model.safetensors")
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"teacher.backbone=local-dir:{net}"))
    assert "the teacher's output is not finite before any training: mend its weights, or name" in said


def test_damaged_weights(recipe: str, place: Path, tmp_path: Path, refused: Said) -> None:
    net = copy_of(place, tmp_path, "small")
    path = net / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    said = refused("run", recipe, "--out", str(tmp_path / "run"), *sets(f"student.backbone=local-dir:{net}"))
    assert f"weights {path} are damaged" in said


# A run that was cut off, and is damaged


@pytest.fixture
def cut_off(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stands in its second task, with several checkpoints."""

    class Killed(BaseException):
        pass

    leave = Run.leave

    def killed(run: Run, stage: str, turns: Any) -> None:
        leave(run, stage, turns)
        if stage == "task1/teacher":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "leave", killed)
        with pytest.raises(Killed):
            cli.main(["run", recipe, "--out", str(tmp_path / "run"), "--json"])
    return tmp_path / "run"


def test_every_checkpoint_damaged(cut_off: Path, refused: Said) -> None:
    for path in toy.checkpoints(cut_off):
        path.write_text("{")
    said = refused("resume", str(cut_off))
    assert f"every checkpoint of {cut_off} is damaged: start the run anew" in said


def test_one_checkpoint_damaged_is_said_and_the_run_goes_on(
    cut_off: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = toy.checkpoints(cut_off)[-1]
    newest.write_text("{")
    with pytest.raises(SystemExit) as end:
        cli.main(["resume", str(cut_off)])
    assert end.value.code in (0, None)
    assert f"warning: {newest} is damaged: its content" in capfd.readouterr().err
    assert (cut_off / "result.json").exists()


def test_a_recipe_that_was_changed(cut_off: Path, refused: Said) -> None:
    path = cut_off / "recipe.yaml"
    path.write_text(path.read_text().replace("pool: 4", "pool: 6"))
    said = refused("resume", str(cut_off))
    assert "recipe.yaml is not what the run began with (teacher.prompts.pool was 4 and is 6): put it" in said
    assert f"go on with what is there now: limbeck resume {cut_off} --changed" in said
    said = refused("resume", str(cut_off), "--changed")
    assert re.search(
        r"does not fit this run: '.*' is \[1, 4, 12\] in it but \[1, 6, 12\] here: put the", said
    )


def test_a_damaged_cache_is_said_and_made_anew(
    cut_off: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "caches").rglob("query.bin"):
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert call("resume", str(cut_off)) == 0, "nothing of the run was lost"
    said = capfd.readouterr().err
    assert re.search(r"warning: .*query\.bin is damaged: its content .*; the cache .* is made anew", said)


def test_a_learning_rate_that_was_changed_on_purpose(cut_off: Path, refused: Said) -> None:
    path = cut_off / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))
    assert "(scenario.optim.lr was 0.01 and is 0.02)" in refused("resume", str(cut_off))
    assert call("resume", str(cut_off), "--changed") == 0
    warned = [line["text"] for line in small.lines(cut_off) if line["event"] == "warning"]
    assert "recipe.yaml is not what the run began with (scenario.optim.lr was 0.01 and is 0.02)" in warned


def test_a_backbone_that_was_changed(cut_off: Path, place: Path, tmp_path: Path, refused: Said) -> None:
    path = cut_off / "recipe.yaml"
    net = copy_of(place, tmp_path, "small")
    weights = load_file(net / "model.safetensors")
    weights["norm.bias"][3] += 1
    save_file(weights, net / "model.safetensors")
    was = place / "small"
    was.rename(place / "kept")
    try:
        net.rename(was)
        said = refused("resume", str(cut_off))
    finally:
        shutil.rmtree(was, ignore_errors=True)
        (place / "kept").rename(was)
    assert path.exists()
    assert "what the run reads is not what the run began with (student.backbone" in said


def test_a_folder_in_use(recipe: str, cut_off: Path, refused: Said) -> None:
    said = refused("run", recipe, "--out", str(cut_off))
    assert f"{cut_off} holds an unfinished run: name another folder with --out, delete it" in said
    assert f"limbeck resume {cut_off}" in said
    api.resume(cut_off, quiet=True)
    assert f"{cut_off} holds a finished run" in refused("run", recipe, "--out", str(cut_off))


def test_a_teacher_that_is_trained_already_cannot_learn_jointly(
    recipe: str, tmp_path: Path, refused: Said
) -> None:
    (tmp_path / "ten.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    images = "images: {channels: 1, size: 8, mean: [0.5], std: [0.5]}"
    teacher = f"teacher={{name: module, target: 'ten:net', {images}}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        changes = sets("student.kd_prompts=null", "scenario.schedule=joint", teacher)
        said = refused("run", recipe, "--out", str(tmp_path / "run"), *changes)
    assert "the teacher was trained before and learns nothing: use teacher_then_student" in said


# A full disk


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_training(
    recipe: str, tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0
    save = state.save_file

    def fills(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            full()
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", fills)
        said = refused("run", recipe, "--out", str(tmp_path / "run"))
    assert re.search(r"cannot write .*000003\.safetensors: the disk is full: free some space", said)
    assert call("resume", str(tmp_path / "run")) == 0
    assert call("run", recipe, "--out", str(tmp_path / "whole")) == 0
    small.assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_disk_that_is_full_for_the_log(
    recipe: str, tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("limbeck.engine.run.claim", lambda _: Path("/dev/full").open("a+b"))  # noqa: SIM115
    said = refused("run", recipe, "--out", str(tmp_path / "run"))
    assert "metrics.jsonl: the disk is full: free some space or point the run elsewhere with --out" in said


def test_a_disk_that_is_full_from_the_start(
    recipe: str, tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    said = refused("run", recipe, "--out", str(tmp_path / "run"))
    assert "the disk is full: free some space" in said


def test_a_place_where_no_folder_can_be(recipe: str, tmp_path: Path, refused: Said) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("run", recipe, "--out", str(tmp_path / "file" / "run"))


# DKD with one class


def test_dkd_of_one_class_is_zero_or_refused_and_never_nan() -> None:
    one = torch.randn(4, 1)
    target, rest = losses.decoupled_kl(one, torch.randn(4, 1), torch.zeros(4).long(), 4.0)
    assert target.item() == 0
    assert rest.item() == 0


def test_a_stream_of_single_classes_runs_with_dkd(recipe: str, tmp_path: Path) -> None:
    single = sets(
        "scenario.tasks=10", "student.prompts.pool=10", "teacher.prompts.pool=10", "scenario.batch_size=16",
        "objective=[{name: labels, weight: 0.5}, {name: dkd}]",
    )  # fmt: skip
    assert call("run", recipe, "--out", str(tmp_path / "run"), *single) == 0
    assert all(line["loss"] == line["loss"] for line in small.lines(tmp_path / "run") if "loss" in line)
