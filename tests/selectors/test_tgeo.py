"""What must be true of TGeo-KD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine import small
from tests.selectors.courses import CLASSES, WIDTH, Small
from torch import Tensor, nn

from limbeck import api, config, losses
from limbeck.contracts import Outputs, Progress
from limbeck.engine.run import Run
from limbeck.errors import ConfigError, NonFiniteError
from limbeck.metrics import cost
from limbeck.selectors.tgeo import (
    WIDTHS,
    Controller,
    Outer,
    TGeo,
    Trilateral,
    ada_share,
    class_mean_teacher,
    geometry_state,
    wls_share,
)

AT = Progress(step=3, steps=8)


def at_work(course: Small, **fields: Any) -> Trilateral:
    found = TGeo(**fields).prepare(course)
    assert isinstance(found, Trilateral)
    return found.double()


def logits(seed: int, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, count, CLASSES, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(CLASSES, (count,), generator=generator)


def outer_of(selection: Trilateral) -> Outer:
    lesson = selection.lesson()
    assert lesson is not None
    assert isinstance(lesson[0], Outer)
    return lesson[0]


# The state and the shares


@given(st.integers(0, 2**31), st.sampled_from(sorted(WIDTHS)))
def test_the_state_has_its_width_no_graph_and_ignores_constants_in_the_logits(seed: int, option: Any) -> None:
    student, teacher, labels = logits(seed)
    mean = class_mean_teacher(teacher.softmax(1), labels, CLASSES)
    state = geometry_state(student.requires_grad_(), teacher, labels, mean, option)
    assert state.shape == (6, WIDTHS[option] * CLASSES)
    assert not state.requires_grad
    torch.testing.assert_close(geometry_state(student + 5, teacher - 3, labels, mean, option), state)


@given(st.integers(0, 2**31))
def test_alpha_lies_inside_0_and_1_and_follows_the_order_of_the_batch(seed: int) -> None:
    student, teacher, labels = logits(seed)
    mean = class_mean_teacher(teacher.softmax(1), labels, CLASSES)
    controller = Controller(9 * CLASSES).double()
    alpha = controller(geometry_state(student, teacher, labels, mean))
    assert ((alpha > 0) & (alpha < 1)).all()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned = controller(geometry_state(student[order], teacher[order], labels[order], mean))
    torch.testing.assert_close(turned, alpha[order])


def test_the_ends_of_alpha_are_cross_entropy_and_kd() -> None:
    course = Small()
    assert course.teacher is not None
    batch = course.batch(course.index)
    said, told = course.student(batch).logits, course.teacher(batch).logits
    ends = {0.0: losses.cross_entropy(said, batch.labels), 1.0: losses.kl_divergence(said, told, 2.0)}
    for alpha, wanted in ends.items():
        terms = course.step(at_work(course, rule="constant", alpha=alpha))(batch, AT)
        torch.testing.assert_close(torch.stack(list(terms.values())).sum(), wanted)


def test_the_class_means_are_distributions_of_the_training_set_alone() -> None:
    course = Small()
    selection = at_work(course)
    assert set(course.asked) == set(course.index.tolist())
    torch.testing.assert_close(selection.class_mean.sum(1), torch.ones(CLASSES).double())
    batch = course.batch(course.index)
    assert course.teacher is not None
    own = course.teacher(batch).logits.softmax(1)[batch.labels == 1].mean(0)
    torch.testing.assert_close(selection.class_mean[1], own)


def test_a_class_without_samples_has_the_uniform_row() -> None:
    found = class_mean_teacher(torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([0]), 3)
    torch.testing.assert_close(found, torch.tensor([[0.9, 0.1, 0.0], [1 / 3] * 3, [1 / 3] * 3]))


def test_a_teacher_that_says_nan_is_refused() -> None:
    course = Small()
    course.inputs[7, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the teacher's answer is not finite in row 7 of 12 \(1 such\)"):
        TGeo().prepare(course)


def test_the_rules_of_the_other_methods() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    labels = torch.tensor([0, 0])
    torch.testing.assert_close(ada_share(teacher, labels), torch.tensor([0.7 - 0.15, 0.0]))
    student = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.25, 0.25]]).log()
    wanted = 1 - torch.exp(-torch.tensor([0.2, 0.5]).log() / torch.tensor([0.7, 0.1]).log())
    torch.testing.assert_close(wls_share(student, teacher, labels), wanted)
    certain = torch.tensor([[1000.0, 0, 0]])
    assert torch.isfinite(wls_share(certain, certain, torch.tensor([0]))).all()
    course = Small()
    batch, none = course.batch(course.index), Outputs(torch.zeros(12, CLASSES))
    for step, alpha in ((0, 1.0), (6, 0.25), (8, 0.0)):
        shares = at_work(course, rule="anneal").weights(batch, none, none, Progress(step=step, steps=8))
        assert (shares["kd"] == alpha).all()
        assert (shares["labels"] == 1 - alpha).all()


def test_free_numbers_learn_from_the_training_loss() -> None:
    course = Small()
    selection = at_work(course, rule="rw")
    batch = course.batch(course.index)
    lesson = selection.lesson()
    assert lesson is not None
    torch.stack(list(lesson[0](batch, AT).values())).sum().backward()
    assert selection.free.grad is not None
    own, told = course.student(batch), course.ask(batch)
    ce = losses.cross_entropy(own.logits, batch.labels, reduction="none")
    kd = losses.kl_divergence(own.logits, told.logits, 2.0, reduction="none")
    wanted = ((kd - ce) * 0.25 / 12).detach()  # the sigmoid's slope at 0 is a quarter
    torch.testing.assert_close(selection.free.grad[:12], wanted)
    assert (selection.free.grad[12:] == 0).all()
    assert all(p.grad is None for p in course.student.parameters())


# The outer step


def uneasy() -> nn.Module:
    """A student with batch norm and dropout."""
    torch.manual_seed(5)
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean = torch.randn(WIDTH)
    return nn.Sequential(norm, nn.Linear(WIDTH, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, CLASSES))


@pytest.mark.parametrize("student", [None, uneasy])
def test_the_hypergradient_is_that_of_finite_differences(student: Any) -> None:
    course = Small(None if student is None else student())
    selection = at_work(course, inner_lr=0.5, validation_batch=4)
    outer, batch = outer_of(selection), course.batch(course.index[:7])
    course.student.train()
    outer(batch, AT)["validation"].backward()
    for parameter in selection.controller.parameters():
        assert parameter.grad is not None
        direction = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                with torch.enable_grad():
                    values.append(outer(batch, AT)["validation"].item())
                parameter -= sign * 1e-5 * direction
        wanted = (values[0] - values[1]) / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert any(parameter.grad.abs().max() > 1e-6 for parameter in selection.controller.parameters())


def test_alpha_rises_where_the_teacher_leads_nearer_to_the_held_out_samples() -> None:
    """d outer / d alpha_i = -(inner_lr / B) <v, g_i>, formed from gradients of single samples."""
    course = Small()
    selection = at_work(course, inner_lr=0.5)
    batch, weight = course.batch(course.index[:5]), course.student.network.weight
    alpha = torch.full((5,), 0.4, dtype=torch.float64, requires_grad=True)
    selection.alpha = lambda *_: alpha  # type: ignore[method-assign]
    outer = outer_of(selection)
    (found,) = torch.autograd.grad(outer(batch, AT)["validation"], alpha)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(course.student.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    told, said = course.ask(batch).logits, course.student(batch).logits
    kd = losses.kl_divergence(said, told, 2.0, reduction="none")
    ce = losses.cross_entropy(said, batch.labels, reduction="none")
    each = torch.stack([gradient(kd[i] - ce[i]) for i in range(5)])
    inner = gradient((alpha.detach() * kd + (1 - alpha.detach()) * ce).mean())
    with torch.no_grad():
        weight -= 0.5 * inner[: weight.numel()].view_as(weight)
        course.student.network.bias -= 0.5 * inner[weight.numel() :]
    held = outer.held_out(AT)
    v = gradient(losses.cross_entropy(course.student(held).logits, held.labels))
    torch.testing.assert_close(found, -(0.5 / 5) * each @ v, rtol=1e-9, atol=1e-12)


def test_a_step_moves_the_controller_and_no_step_size_moves_nothing() -> None:
    course = Small()
    selection = at_work(course)
    outer, optim = outer_of(selection), selection.plan.optim
    optimizer = optim.build([{"params": list(outer.parameters())}])
    before = [p.detach().clone() for p in selection.controller.parameters()]
    outer(course.batch(course.index), AT)["validation"].backward()
    optimizer.step()
    assert any(not torch.equal(p, b) for p, b in zip(selection.controller.parameters(), before, strict=True))
    still = at_work(course, inner_lr=0.0)
    outer_of(still)(course.batch(course.index), AT)["validation"].backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in still.controller.parameters())


def test_the_outer_step_leaves_student_teacher_and_statistics_alone() -> None:
    course = Small(uneasy())
    assert course.teacher is not None
    nets = nn.ModuleList([course.student, course.teacher])
    course.student.train()
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    outer_of(at_work(course))(course.batch(course.index), AT)["validation"].backward()
    assert all(torch.equal(value, before[name]) for name, value in nets.state_dict().items())
    assert all(p.grad is None for p in nets.parameters())
    assert course.student.training


def test_a_sample_on_which_all_agree_gets_no_hypergradient() -> None:
    course = Small()
    assert course.teacher is not None
    with torch.no_grad():
        for net in (course.student, course.teacher):
            net.network.weight[0, 0] = 1000
    course.inputs[0] = torch.tensor([1.0, 0, 0, 0])  # both networks and the label say class 0
    selection = at_work(course)
    alpha = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    selection.alpha = lambda *_: alpha  # type: ignore[method-assign]
    loss = outer_of(selection)(course.batch(course.index[:4]), AT)["validation"]
    (found,) = torch.autograd.grad(loss, alpha)
    assert found[0].abs() < 1e-100
    assert (found[1:] != 0).all()


def test_outer_samples_are_held_out_and_follow_from_the_step_alone() -> None:
    course = Small()
    outer = outer_of(at_work(course, validation_batch=4))
    drawn = [outer.held_out(Progress(step=step, steps=9)).index for step in range(9)]
    assert all(len(index) == 4 == len(index.unique()) for index in drawn)
    assert set(torch.cat(drawn).tolist()) == set(course.held_out.tolist())
    assert torch.equal(outer.held_out(Progress(step=2, steps=9)).index, drawn[2])


# What is refused


def without(**changed: Any) -> Small:
    course = Small()
    for name, value in changed.items():
        setattr(course, name, value)
    return course


@pytest.mark.parametrize(
    ("fields", "changed", "message"),
    [
        ({}, {"held_out": torch.arange(0)}, "learns from held-out samples but scenario.validation is 0"),
        ({}, {"teacher": None}, "weighs a teacher against the labels but teacher is none"),
        ({}, {"labelled": torch.arange(18) < 9}, "reads every label but data.labelled hides some"),
        ({"kd": "dkd"}, {}, "unknown objective 'dkd' at selector: did you mean 'kd'"),
    ],
)
def test_a_course_that_does_not_fit_is_refused(
    fields: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TGeo(**fields).prepare(without(**changed))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "learnt"}, "unknown rule 'learnt': did you mean 'learned'"),
        ({"option": 4}, "option is 4: allowed are 2, 3, 6, 7"),
        ({"alpha": 1.5}, "alpha is 1.5: allowed are shares from 0 to 1"),
        ({"inner_lr": -1.0}, "inner_lr is -1.0: allowed are finite values of at least 0"),
        ({"validation_batch": 0}, "validation_batch is 0: allowed are values of at least 1"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TGeo(**fields)


# Whole runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def recipe(*sets: str) -> config.Recipe:
    few = ("scenario.epochs=2", "scenario.teacher_epochs=2", "scenario.batch_size=256")
    return config.load("tgeo-kd", (*few, "engine.threads=1", "engine.reuse_teachers=false", *sets))


@pytest.mark.parametrize("student", ["{name: mlp, hidden: [8]}", "{name: cnn, widths: [2, 3]}"])
def test_killed_and_resumed(tmp_path: Path, quick: None, student: str) -> None:
    class Killed(BaseException):
        pass

    asked = recipe(f"student={student}", "engine.checkpoint_seconds=0", "engine.diagnose_every=1")
    api.run(asked, out=tmp_path / "whole", quiet=True)
    shares = Run.shares
    turns = 0

    def deadly(self: Run, turn: str, at: Progress, found: dict[str, float]) -> None:
        nonlocal turns
        turns += turn == "student" and self.stage == "train"
        if turns == 7:  # after the selector's turn of the same step
            raise Killed
        shares(self, turn, at, found)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "shares", deadly)
        api.run(asked, out=tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", tmp_path / "whole")


def test_alpha_tells_wrong_labels_from_wrong_teachers(tmp_path: Path, quick: None) -> None:
    asked = config.load("tgeo-kd", ("scenario.epochs=12", "engine.threads=1", "seed=100"))
    found = api.run(asked, out=tmp_path / "run", quiet=True).data["selection"]
    groups = {name: group["alpha"] for name, group in found["groups"].items()}
    assert groups["wrong_label"] > groups["wrong_teacher"] + 0.3
    assert groups["wrong_label"] > groups["clean"]
