"""What must be true of Talking Models: messages go through the teacher, and only while the student learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.battery.networks import batch, seeded
from torch import Tensor, nn

from limbeck import api, config
from limbeck.contracts import Batch, Facts, Net, Outputs, Progress, Spec
from limbeck.errors import ConfigError, ShapeError
from limbeck.metrics import cost
from limbeck.nets.conversation import Conversation, ending, still
from limbeck.nets.small import MLP, ConvNet
from limbeck.nets.taps import Frozen, Tapped
from limbeck.objectives.labels import Labels
from limbeck.objectives.talking import Talk, Talking
from limbeck.students.mlp import MLPStudent

TAPS = {
    "student_low": "hidden.0", "student_high": "hidden.1", "teacher_low": "hidden.0",
    "teacher_high": "hidden.1",
}  # fmt: skip


class Pair:
    """A student of six classes, a teacher of ten, and an objective between them."""

    def __init__(self, teacher: Net | None = None, student: Net | None = None, **fields: Any) -> None:
        torch.manual_seed(0)
        self.student = student or Tapped(MLP(64, (7, 9), 6))
        self.teacher = teacher or Tapped(MLP(64, (12, 11), 10)).requires_grad_(False)
        self.objective = Talking(**{**TAPS, **fields})
        own, other = self.said(batch())
        facts = Facts(student=self.student, teacher=self.teacher)
        self.talk: Any = self.objective.build(own, other, facts)

    def said(self, seen: Batch) -> tuple[Outputs, Outputs]:
        needs = self.objective.needs()
        return self.student(seen, needs.student), self.teacher(seen, needs.teacher).detach()

    def terms(self, seen: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.talk(*self.said(seen), seen, Progress())
        return terms

    def task(self, seen: Batch) -> Tensor:
        own, other = self.said(seen)
        return Labels().terms(own, other, seen, Progress())["labels"]

    def gradient(self, loss: Tensor, tap: str = "hidden.0") -> Tensor | None:
        weight = self.student.get_submodule(f"network.{tap}.0").weight
        return torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)[0]


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def test_with_all_weights_zero_it_is_plain_training() -> None:
    pair = Pair(interact=0, message=0, state=0, rounds=2)
    seen = batch()
    task, both = pair.task(seen), pair.task(seen) + total(pair.terms(seen))
    assert both == task
    params = list(pair.student.parameters())
    for a, b in zip(torch.autograd.grad(task, params), torch.autograd.grad(both, params), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_each_round_has_one_of_each_term(rounds: int) -> None:
    pair = Pair(rounds=rounds)
    names = {f"{name}{r}" for r in range(1, rounds + 1) for name in ("interact", "message", "state")}
    assert pair.terms(batch()).keys() == names
    used = total(pair.terms(batch())).requires_grad if rounds else False
    assert used == bool(rounds)
    assert bool(list(pair.talk.parameters())) == bool(rounds)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_passes_through_a_teacher_that_stands_still(frozen: bool) -> None:
    torch.manual_seed(1)
    inner = Tapped(MLP(64, (12, 11), 10))
    pair = Pair(Frozen(inner) if frozen else inner.requires_grad_(False))
    before = {k: v.clone() for k, v in pair.teacher.state_dict().items()}
    found = pair.gradient(pair.terms(batch())["interact1"])
    assert found is not None and found.abs().max() > 0
    total(pair.terms(batch())).backward()
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in pair.teacher.state_dict().items())


def test_a_question_cut_off_from_the_student_carries_no_gradient() -> None:
    pair = Pair()
    pair.talk.conversation.teacher_decode.register_forward_pre_hook(lambda _, given: (given[0].detach(),))
    assert pair.gradient(pair.terms(batch())["interact1"]) is None


def test_consistency_is_zero_only_where_both_sides_agree() -> None:
    class Agreeing(Conversation):
        def forward(self, low: Tensor, middle: Any, top: Any) -> Any:
            (said,) = super().forward(low, middle, top)
            return [type(said)(said.question, said.posed, said.question, self.high_state, said.logits)]

    pair = Pair()
    assert all(value > 0 for value in pair.terms(batch()).values())
    own, _ = pair.said(batch())
    pair.talk.conversation.__class__ = Agreeing
    pair.talk.conversation.high_state = own.features["hidden.1"]
    terms = pair.terms(batch())
    assert terms["message1"] == 0 and terms["state1"] == 0 and terms["interact1"] > 0


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("hidden", [None, 5])
def test_widths_are_free(width: int, hidden: int | None) -> None:
    terms = Pair(width=width, hidden=hidden, rounds=2).terms(batch())
    assert all(torch.isfinite(term) for term in terms.values())


def test_maps_talk_to_vectors_and_batch_norms_keep_their_averages() -> None:
    student = Tapped(ConvNet(1, (2, 3), 6))
    pair = Pair(student=student, student_low="stages.0", student_high="stages.0.4")
    own, other = pair.said(batch())
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student.train()
    found = pair.talk(own, other, batch(), Progress())
    assert all(torch.isfinite(term) for term in found.values())
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_still_norms_normalise_by_the_batch() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3, generator=seeded())
    with still(norm):
        inside = norm(x)
    assert norm.running_mean is not None and norm.running_mean.abs().max() == 0
    torch.testing.assert_close(inside, norm(x))


def test_the_teacher_is_in_evaluation_mode() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    teacher = Tapped(body).requires_grad_(False)
    pair = Pair(teacher, teacher_low="1", teacher_high="3")
    own, other = pair.said(batch())
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    first, second = (pair.talk(own, other, batch(), Progress()) for _ in range(2))
    assert not body.training
    assert first["interact1"] == second["interact1"]
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_the_teacher_need_not_hear_the_sample() -> None:
    """What stands below the teacher's lower state does not matter: only the question does."""
    pair = Pair()
    own, other = pair.said(batch())
    plain = pair.talk(own, other, batch(), Progress())
    first = pair.teacher.get_submodule("network.hidden.0.0")
    with torch.no_grad():
        first.weight.add_(1)
    again = pair.talk(own, other, batch(), Progress())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_teacher_that_always_says_the_same_tells_nothing() -> None:
    """All answers are equal, so their cross entropy is at best that of the classes' shares."""
    pair = Pair()
    with torch.no_grad():
        pair.teacher.get_submodule("network.hidden.1.0").weight.zero_()
    seen = batch(count=30)
    own, other = pair.said(seen)
    rounds = pair.talk.conversation(
        own.features["hidden.0"], lambda w: w.new_ones(len(w), 11), ending(pair.student, seen, "hidden.1")
    )
    assert torch.equal(rounds[0].logits, rounds[0].logits[:1].expand_as(rounds[0].logits))
    shares = torch.bincount(seen.labels, minlength=6) / 30
    entropy = -(shares * shares.log()).sum()
    assert pair.talk(own, other, seen, Progress())["interact1"] >= entropy - 1e-5


def test_other_tasks_swap_the_task_loss_alone() -> None:
    class Regressing(Talk):
        def task(self, logits: Tensor, student: Outputs, seen: Batch) -> Tensor:
            return F.mse_loss(logits[:, 0], seen.labels.float())

    pair = Pair()
    pair.talk.__class__ = Regressing
    assert torch.isfinite(pair.terms(batch())["interact1"])


def test_grounding_listens_to_the_teachers_own_state() -> None:
    pair = Pair(ground=0.5)
    assert pair.terms(batch())["ground1"] > 0
    assert "ground1" not in Pair().terms(batch())


def test_collapsed_messages_are_seen() -> None:
    pair = Pair()
    for _ in range(3):
        pair.terms(batch())
    alive = pair.talk.facts()["message_variance"]
    assert alive["question"] > 0 and alive["answer"] > 0
    with torch.no_grad():
        pair.talk.conversation.encode.weight.zero_()
    for _ in range(200):
        pair.terms(batch())
    assert pair.talk.facts()["message_variance"]["question"] < 1e-6


def test_what_cannot_be_run_from_within_is_refused() -> None:
    with pytest.raises(ConfigError, match="talking runs both networks from within"):
        Talking(**TAPS).build(Outputs(torch.zeros(2, 2)), Outputs(torch.zeros(2, 2)))
    pair = Pair()
    own, other = pair.said(batch())
    with pytest.raises(ShapeError, match="talking needs scenario static"):
        pair.talk(own.columns(0, 3), other, batch(), Progress())


def test_a_run_between_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    few = ("scenario.epochs=2", "scenario.teacher_epochs=1", "engine.threads=1")
    found = api.run(config.load("talking", few), out=tmp_path / "run", quiet=True).data
    assert set(found["objectives"]["talking"]["message_variance"]) == {"question", "answer"}
    assert found["teacher"] is None, "a teacher of other classes is not measured on the student's"
    alone = MLPStudent(hidden=(16, 16)).build(Spec(classes=2, channels=1, size=8), seeded())
    assert found["cost"]["student"]["parameters"] == sum(p.numel() for p in alone.parameters())
    student = api.load_student(tmp_path / "run")
    assert set(student.state_dict()) == set(alone.state_dict())
