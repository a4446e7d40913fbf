"""DFPT-KD at work: what it trains, what stays, a run that is killed, a stream."""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, toy
from tests.engine.test_resume import EVERY_STEP, Killed, dies_at
from torch import Tensor, nn

from limbeck import api, config, plain
from limbeck.config import Recipe
from limbeck.contracts import Batch, Outputs, Progress, Spec
from limbeck.engine.distillation import Distillation, combine
from limbeck.engine.fit import Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.errors import ConfigError, NonFiniteError
from limbeck.metrics import cost
from limbeck.nets.dual_path import DualPath, SecondPath
from limbeck.nets.small import ConvNet
from limbeck.nets.taps import Tapped
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.scenarios.pair import Pair
from limbeck.students.cifar_resnet import CifarResNetStudent
from limbeck.students.cnn import CNNStudent
from limbeck.teachers.dfpt import DFPT
from limbeck.teachers.lelp import LELPTeacher
from limbeck.teachers.trained import Trained

SPEC = Spec(classes=10, channels=1, size=8)
CE, FROM_TEACHER, FROM_PATH = Labels(), KD(weight=1.0), KD(weight=1.0, path="prompt")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def batches(count: int = 6) -> list[Batch]:
    ids = torch.arange(16)
    images = [torch.randn(16, 1, 8, 8, generator=seed(n)) for n in range(count)]
    return [Batch(inputs=x, labels=ids % 10, index=ids, view=0 * ids) for x in images]


def teacher(**fields: Any) -> DualPath:
    """A teacher whose batch norm has seen data, standing still."""
    choice = DFPT(teacher=Trained(network=CNNStudent(widths=(8, 12, 16))), **fields)
    net = choice.build(SPEC, seed())
    assert isinstance(net, DualPath)
    for each in batches():
        net.train()(each)
    net.finish_task()
    net.requires_grad_(False).eval()
    return net


def step(net: DualPath, *objectives: Any, student: nn.Module | None = None) -> Distillation:
    named = {f"o{n}": o for n, o in enumerate(objectives)}
    dummy = Outputs(torch.empty(1, 10))
    return Distillation(
        student or pupil(),
        {name: o.build(dummy, dummy) for name, o in named.items()},
        combine(named),
        ask=lambda batch: net(batch),  # unregistered, as the engine has it
        adapting=net.adapting(),
        paths={name: o.path for name, o in named.items()},
    )


def pupil() -> Tapped:
    torch.manual_seed(5)
    return Tapped(ConvNet(1, (2, 3, 4), 10))


def train(module: nn.Module, optim: Optim | None = None) -> None:
    turn = Turn("student", module, optim or Optim(lr=0.01), {})
    module.train()
    for number, each in enumerate(batches()):
        turn.optim.set_rate(turn.optimizer, Progress(step=number, steps=6))
        terms = module(each, Progress(step=number, steps=6))
        turn.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        turn.optimizer.step()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What must be true


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("optim", [Optim(lr=0.01), Optim(name="sgd", lr=0.1, weight_decay=0.1, ema=0.9)])
def test_the_teacher_is_bit_identical_after_training(plus: bool, optim: Optim) -> None:
    net = teacher(plus=plus)
    before, probe = state(net), batches(1)[0]
    said, path = net(probe).logits, state(net.adapting())
    train(step(net, CE, FROM_TEACHER, FROM_PATH), optim)
    assert same(state(net), before)
    assert torch.equal(net(probe).logits, said)
    moved = {
        name for name, value in net.adapting().state_dict().items() if not torch.equal(value, path[name])
    }
    assert {name.split(".")[0] for name in moved} == (
        {"blocks", "head", "copy"} if plus else {"blocks", "head"}
    )
    assert {"blocks.0.fuse.conv.weight", "blocks.1.prompt.up.weight", "head.weight"} <= moved


@pytest.mark.parametrize("plus", [False, True])
def test_identity_start_after_the_teachers_own_phase(plus: bool) -> None:
    net = teacher(init="identity", plus=plus)
    probe = batches(1)[0]
    said = net(probe)
    assert torch.equal(net.adapting().eval()(probe, said).along("prompt").logits, said.logits)


def test_without_the_path_the_student_learns_by_plain_kd() -> None:
    """Whatever the path learns from."""
    silent = KD(weight=0.0, path="prompt")
    ends = []
    for fields in ({}, {"w_ce": 0.3, "w_student": 7.0, "plus": True}):
        module = step(teacher(**fields), CE, FROM_TEACHER, silent)
        train(module)
        ends.append(state(module.student))
    plain_kd = step(teacher(), CE, FROM_TEACHER)
    plain_kd.adapting = None
    train(plain_kd)
    assert same(ends[0], ends[1])
    assert same(ends[0], state(plain_kd.student))


def test_without_both_paths_the_student_learns_by_labels_alone() -> None:
    module = step(teacher(), CE, KD(weight=0.0), KD(weight=0.0, path="prompt"))
    train(module)
    dummy = Outputs(torch.empty(1, 10))
    alone = Distillation(pupil(), {"labels": CE.build(dummy, dummy)}, combine({"labels": CE}))
    train(alone)
    assert same(state(module.student), state(alone.student))


def test_when_all_three_agree_the_distillation_terms_and_gradients_are_0() -> None:
    """A student that is the teacher, and the identity start."""
    net = teacher(init="identity")
    twin = copy.deepcopy(net.inner).requires_grad_(True)
    module = step(net, FROM_TEACHER, FROM_PATH, student=twin).eval()
    terms = module(batches(1)[0], Progress())
    assert terms.pop("teacher.labels").detach() > 0
    torch.stack(list(terms.values())).sum().backward()
    assert [float(value.detach()) for value in terms.values()] == [0, 0, 0, 0]
    path = net.adapting()
    grads = [p.grad for p in [*twin.parameters(), *path.parameters()] if p.grad is not None]
    assert max(float(grad.abs().max()) for grad in grads) < 1e-7


def test_each_loss_reaches_its_own_side_alone() -> None:
    net = teacher()
    module = step(net, CE, FROM_TEACHER, FROM_PATH).train()
    terms = module(batches(1)[0], Progress())
    sides = {"path": net.adapting(), "student": module.student}
    for name, value in terms.items():
        mine = "path" if name.startswith("teacher.") else "student"
        for side, part in sides.items():
            grads = torch.autograd.grad(value, list(part.parameters()), retain_graph=True, allow_unused=True)
            reached = sum(float(grad.abs().sum()) for grad in grads if grad is not None)
            assert (reached > 0) == (side == mine), f"{name} and the {side}"
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_the_first_block_learns_through_the_frozen_stages() -> None:
    net = teacher()
    module = step(net, CE, FROM_TEACHER, FROM_PATH).train()
    torch.stack(list(module(batches(1)[0], Progress()).values())).sum().backward()
    for number in range(2):
        block = net.adapting().blocks[number]
        assert all(p.grad is not None for p in block.parameters())
        assert sum(float(p.grad.abs().sum()) for p in block.parameters() if p.grad is not None) > 0


def learning(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        (CNNStudent(widths=(32, 64, 128)), SPEC),
        (CifarResNetStudent(depth=56), Spec(classes=100, size=32)),
        (CifarResNetStudent(depth=20), Spec(classes=100, size=32)),
    ],
    ids=["cnn", "resnet56", "resnet20"],
)
def test_the_path_trains_less_than_half_of_the_teacher(network: Any, spec: Spec) -> None:
    net = DFPT(teacher=Trained(network=network)).build(spec, seed())
    plus = DFPT(teacher=Trained(network=network), plus=True).build(spec, seed())
    path, own = net.adapting(), plus.adapting()
    assert path is not None and own is not None
    assert learning(path) < learning(net) / 2
    head = learning(path.get_submodule("head"))
    assert learning(own) == learning(path) + learning(net) - head  # its own head stands for the copy's


def test_nan_from_the_teacher_stops_before_any_step(tmp_path: Path) -> None:
    net = teacher()
    module = step(net, CE, FROM_TEACHER, FROM_PATH)
    with torch.no_grad():
        net.inner.get_submodule("network.head").bias[3] = torch.nan  # type: ignore[index,operator]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    class Fixed:
        steps = 1

        def epoch(self, epoch: int, start: int = 0) -> Any:
            return iter(batches(1))

    with toy.run(tmp_path) as run:
        run.modules = nn.ModuleDict({"student": module})
        with pytest.raises(NonFiniteError, match=r"'teacher.kd' is nan; the teacher's output is not finite"):
            fit(run, "train", [Turn("student", module, Optim(), {})], Fixed(), 1)
    assert same({name: p.detach() for name, p in module.named_parameters()}, before)


def test_learning_rates_of_the_parts() -> None:
    net = teacher(plus=True, plus_lr=0.2, lr=0.5)
    module = step(net, CE, FROM_TEACHER, FROM_PATH)
    turn = Turn("student", module, Optim(lr=0.1, schedule="constant"), {})
    turn.optim.set_rate(turn.optimizer, Progress())
    rates = {id(p): group["lr"] for group in turn.optimizer.param_groups for p in group["params"]}
    path: SecondPath = net.adapting()
    assert {rates[id(p)] for p in path.blocks.parameters()} == {0.05}
    assert path.copy is not None
    assert {rates[id(p)] for p in path.copy.parameters() if p.requires_grad} == {0.1 * 0.2}
    assert {rates[id(p)] for p in module.student.parameters()} == {0.1}


def test_the_teacher_inside_is_built_as_it_would_be_alone() -> None:
    inside = Trained(network=CNNStudent())
    alone = inside.build(SPEC, seed(3))
    net = DFPT(teacher=inside).build(SPEC, seed(3))
    assert same(state(net.get_submodule("inner")), state(alone))
    choice = DFPT(teacher=Trained(network=CNNStudent(), data=config.load("kd").data))
    assert choice.learns and choice.lessons() == config.load("kd").data
    assert choice.input_spec() == CNNStudent().images


def test_a_path_inside_another_teacher_is_refused() -> None:
    choice = DFPT(teacher=Trained(network=CNNStudent()))
    with pytest.raises(ConfigError, match="a dfpt teacher stands inside another teacher, where its path"):
        LELPTeacher(teacher=choice).build(SPEC, seed(3))


# Whole runs


def given(*sets: str) -> Recipe:
    asked: dict[str, Any] = {
        "name": "small",
        "teacher": {
            "name": "dfpt",
            "teacher": {"name": "trained", "network": {"name": "cnn", "widths": [4, 6]}},
        },
        "student": {"name": "cnn", "widths": [2, 3]},
        "objective": ["labels", {"name": "kd"}, {"name": "kd", "path": "prompt"}],
        "scenario": {"name": "static", "epochs": 3, "batch_size": 25, "optim": {"lr": 0.01}},
        "data": {"name": "part", "data": {"name": "digits"}, "per_class": 10, "noise": 0.2},
        "engine": {"threads": 1, "checkpoint_seconds": 1000, "reuse_teachers": False, "log_every": 2},
    }
    for item in sets:
        asked = plain.override(asked, item)
    return config.build(asked)


def test_a_path_that_nobody_listens_to_is_told_of(tmp_path: Path) -> None:
    few = ("scenario.epochs=1", "scenario.teacher_epochs=1", f"engine.cache_root={tmp_path}")
    for name, objective in (("deaf", "[labels, kd]"), ("heard", "[labels, {name: kd, path: prompt}]")):
        api.run(given(*few, f"objective={objective}"), out=tmp_path / name, quiet=True)
    told = {
        name: [line["text"] for line in small.lines(tmp_path / name) if line["event"] == "warning"]
        for name in ("deaf", "heard")
    }
    assert any("no objective listens to it" in text for text in told["deaf"])
    assert not any("no objective listens to it" in text for text in told["heard"])


PLUS = ("teacher.plus=true", "teacher.norm=batch")
SHIFTED = ("student.images={channels: 1, size: 8, mean: [0.3], std: [0.7]}",)


@functools.cache
def uninterrupted(folder: Path, *sets: str) -> Path:
    place = folder / str(len(sets))
    api.run(given(*sets, f"engine.cache_root={place}.caches"), out=place, quiet=True)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


STEPS = 12  # of a stage


@pytest.mark.parametrize("call", [7, STEPS + 8], ids=["the teacher's phase", "the student's phase"])
@pytest.mark.parametrize("sets", [(), PLUS], ids=["dfpt", "plus"])
def test_killed_and_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], call: int
) -> None:
    whole = uninterrupted(place, *sets)
    with monkeypatch.context() as deadly:
        dies_at(deadly, Run, "diagnoses", call)
        with pytest.raises(Killed):
            caches = f"engine.cache_root={tmp_path}/caches"
            api.run(given(*sets, EVERY_STEP, caches), out=tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("sets", [(), PLUS], ids=["dfpt", "plus"])
def test_the_figures_of_a_run(place: Path, sets: tuple[str, ...]) -> None:
    folder = uninterrupted(place, *sets)
    result = json.loads((folder / "result.json").read_text())
    path = result["paths"]["prompt"]
    assert path["kl"] > 0 and result["fidelity"]["kl"] > 0 and 0 <= path["accuracy"] <= 100
    net = given(*sets).teacher.build(SPEC, seed())
    second = net.adapting()
    assert second is not None
    assert result["cost"]["second_path"] == {"trainable": learning(second)}
    assert result["cost"]["teacher"]["trainable"] == learning(net)
    steps = [line for line in small.lines(folder) if line["event"] == "step" and line["stage"] == "train"]
    assert steps[0]["terms"].keys() == {
        "labels", "kd", "kd2.kd", "teacher.labels", "teacher.kd", "teacher.student",
    }  # fmt: skip


def test_images_are_as_the_teacher_knows_them_on_both_paths(tmp_path: Path) -> None:
    """Student and teacher normalise otherwise; the identity start must answer as the teacher."""
    recipe = given(*SHIFTED, "teacher.init=identity")
    images = batches(1)[0]
    with Run(tmp_path, recipe.engine, 0, quiet=True) as run:
        pair = Pair(recipe, run, SPEC, images)
        assert pair.teacher is not None and pair.adapting is not None
        pair.teach(False)
        pair.teacher.finish_task()
        said = pair.ask_live(images)
        assert torch.equal(pair.adapting.eval()(images, said).along("prompt").logits, said.logits)
        assert not torch.allclose(said.logits, pair.teacher.get_submodule("inner")(images).logits)


def stream(folder: Path, *sets: str) -> Recipe:
    inside = small.given(folder)["teacher"]
    asked = small.given(folder, "scenario.epochs=2", "student.kd_prompts=null") | {
        "teacher": {"name": "dfpt", "teacher": inside},
        "objective": ["labels", {"name": "kd", "temperature": 2}, {"name": "kd", "path": "prompt"}],
    }
    for item in sets:
        asked = plain.override(asked, item)
    return config.build(asked)


@pytest.mark.parametrize(
    "sets",
    [(), ("teacher.plus=true", "teacher.per_task=restart"), ("scenario.query=own", "teacher.plus=true")],
    ids=["continue", "plus, restart", "own query, plus"],
)
def test_a_stream(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...]
) -> None:
    """Each task's path is measured on all classes seen; a killed run ends the same."""
    caches = f"engine.cache_root={tmp_path}/caches"
    api.run(stream(place, *sets, caches), out=tmp_path / "whole", quiet=True)
    with monkeypatch.context() as deadly:
        dies_at(deadly, Run, "diagnoses", 36)
        with pytest.raises(Killed):
            api.run(stream(place, *sets, EVERY_STEP, f"{caches}2"), out=tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", tmp_path / "whole")
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    path = result["paths"]["prompt"]
    assert len(path["accuracy_matrix"]) == 2
    assert path["kl"] > 0 and path["agreement"] <= 100
    assert result["cost"]["second_path"]["trainable"] > 0


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("per_task", ["continue", "restart"])
def test_the_path_from_task_to_task(place: Path, per_task: Any, plus: bool) -> None:
    recipe = stream(place, f"teacher.per_task={per_task}", f"teacher.plus={str(plus).lower()}")
    net: Any = recipe.teacher.build(Spec(classes=10, tasks=2, channels=1, size=8), seed())
    path = net.adapting()

    def lesson(task: int) -> None:
        net.start_task(task, seed(task))
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        net.finish_task()

    lesson(0)
    with torch.no_grad():
        for parameter in path.parameters():
            if parameter.requires_grad:
                parameter += 0.25
    learnt = state(path)
    lesson(1)
    now = state(path)
    kept = {name for name, value in now.items() if torch.equal(value, learnt[name])}
    moving = {name for name, p in path.named_parameters() if p.requires_grad}
    assert (moving <= kept) == (per_task == "continue")
    if plus:  # what is no stage is the teacher's own of now
        assert same(path.copy.prompts.state_dict(), net.inner.prompts.state_dict())
        trained = path.copy.backbone.state_dict()
        assert same(trained, net.inner.backbone.state_dict()) == (per_task == "restart")


def test_another_class_order(place: Path) -> None:
    """A teacher that was trained before, on the data's own numbers."""
    net = DFPT(teacher=Trained(network=CNNStudent(widths=(4, 6))), init="identity").build(SPEC, seed())
    path, images = net.requires_grad_(False).eval().adapting(), batches(1)[0]
    assert path is not None
    path.order = torch.randperm(10, generator=seed())
    said = path(images, net(images)).along("prompt")
    assert torch.equal(said.logits, net(images).logits[:, path.order])
