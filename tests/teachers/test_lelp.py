"""What must be true of LELP: subclasses from the teacher's embedding, and a student that answers in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.battery.networks import IMAGES, SPEC, batch, seeded
from torch import Tensor

from limbeck import api, config, losses
from limbeck.contracts import Batch, Net, Outputs, Progress
from limbeck.engine.run import Run
from limbeck.errors import ConfigError, DataError, ShapeError
from limbeck.metrics import cost
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.objectives.lelp import LELP
from limbeck.students.lelp import LELPStudent
from limbeck.students.mlp import MLPStudent
from limbeck.teachers.lelp import LELPTeacher
from limbeck.teachers.trained import Trained

CLASSES, COUNT, WIDTH = SPEC.classes, 3, 20


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def samples(count: int = 60) -> Batch:
    return batch(count=count)


def built(**fields: object) -> Net:
    inner = Trained(network=MLPStudent(hidden=(WIDTH,), images=IMAGES))
    choice = LELPTeacher(teacher=inner, **{"subclasses": COUNT, **fields})  # type: ignore[arg-type]
    return choice.build(SPEC, seeded()).eval()


def taught(**fields: object) -> tuple[Net, Batch]:
    net, seen = built(**fields), samples()
    with torch.no_grad():
        net.observe([replace_rows(seen, slice(0, 25)), replace_rows(seen, slice(25, 60))])
    return net, seen


def replace_rows(given: Batch, rows: slice) -> Batch:
    return replace(
        given, inputs=given.inputs[rows], labels=given.labels[rows], index=given.index[rows],
        view=given.view[rows],
    )  # fmt: skip


def subclasses(net: Net, seen: Batch) -> tuple[Tensor, Tensor]:
    """Class probabilities [B, C] and subclass probabilities [B, C, S]."""
    with torch.no_grad():
        out = net(seen)
    assert out.soft_logits is not None
    return out.logits.softmax(1), out.soft_logits.exp().reshape(len(out.logits), CLASSES, -1)


VARIANTS = [
    {}, {"null_space": False}, {"rotation": False}, {"directions": "random"}, {"directions": "kmeans"},
    {"directions": "chance"},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_subclasses_of_a_class_add_up_to_it(fields: dict[str, object]) -> None:
    p, q = subclasses(*taught(**fields))
    torch.testing.assert_close(q.sum(2), p)
    torch.testing.assert_close(q.sum((1, 2)), torch.ones(60))
    assert q.std() > 0 and (q - p.unsqueeze(2) / COUNT).abs().max() > 0.05


def test_before_it_has_looked_all_subclasses_are_alike() -> None:
    p, q = subclasses(built(), samples())
    torch.testing.assert_close(q, (p / COUNT).unsqueeze(2).expand_as(q))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8))
def test_with_one_subclass_it_is_kd(seed: int, temperature: float) -> None:
    own, other = draw(seed, 7, CLASSES).requires_grad_(), draw(seed + 1, 7, CLASSES)
    told = losses.subclass_log_probs(other, draw(seed + 2, 7, CLASSES, 1)).flatten(1)
    torch.testing.assert_close(told, other.log_softmax(1))
    loss = losses.subclass_kl(own, told, CLASSES, temperature)
    plain = losses.kl_divergence(own, other, temperature)
    torch.testing.assert_close(loss, plain)
    grads = [torch.autograd.grad(x, own, retain_graph=True)[0] for x in (loss, plain)]
    torch.testing.assert_close(*grads)


def test_one_subclass_in_the_networks_is_kd() -> None:
    teacher, seen = taught(subclasses=1)
    student = LELPStudent(network=MLPStudent(hidden=(8,), images=IMAGES), subclasses=1).build(SPEC, seeded(4))
    own, other = student(seen), teacher(seen).detach()
    terms = LELP(temperature=2).build(own, other)(own, other, seen, Progress())
    plain = KD(weight=1, temperature=2).terms(Outputs(own.logits), Outputs(other.logits), seen, Progress())
    torch.testing.assert_close(terms["lelp"], plain["kd"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(6, 12))
def test_the_projector_projects_onto_the_null_space(seed: int, classes: int, width: int) -> None:
    weight = draw(seed, classes, width)
    weight[-1] = weight[0]  # rank classes - 1
    projector = losses.null_projector(weight)
    zero = projector @ weight.mT
    torch.testing.assert_close(zero, torch.zeros_like(zero))
    torch.testing.assert_close(projector @ projector, projector)
    assert projector.trace().item() == pytest.approx(width - (classes - 1))  # its rank


@pytest.mark.parametrize("directions", ["principal", "random"])
@pytest.mark.parametrize("rotation", [True, False])
def test_directions_are_orthonormal_in_each_class_and_in_the_null_space(
    directions: str, rotation: bool
) -> None:
    net, _ = taught(directions=directions, rotation=rotation)
    eye = torch.eye(COUNT).expand(CLASSES, -1, -1)
    torch.testing.assert_close(net.rows @ net.rows.mT, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(net.rows @ net.projector, net.rows, atol=1e-5, rtol=0)


def test_positions_are_blind_to_the_row_space_and_logits_to_the_null_space() -> None:
    weight, mean, rows = draw(0, 3, 9), draw(1, 3, 9), draw(2, 3, 2, 9)
    projector = losses.null_projector(weight)
    h, moved = draw(3, 5, 9), draw(4, 5, 3) @ weight
    torch.testing.assert_close(
        losses.positions(h + moved, projector, mean, rows), losses.positions(h, projector, mean, rows)
    )
    torch.testing.assert_close((h + draw(5, 5, 9) @ projector) @ weight.mT, h @ weight.mT)


def test_a_high_temperature_spreads_and_a_low_one_decides() -> None:
    p, q = subclasses(*taught(beta_scale=1e6))
    torch.testing.assert_close(q, (p / COUNT).unsqueeze(2).expand_as(q), rtol=1e-4, atol=1e-5)
    p, q = subclasses(*taught(beta_scale=1e-5))
    torch.testing.assert_close(q.max(2).values, p, rtol=1e-2, atol=1e-3)


def test_folding_is_a_sum_of_probabilities_and_its_gradient_reaches_each_part() -> None:
    raw = draw(0, 4, CLASSES * COUNT).requires_grad_()
    folded = losses.fold(raw, CLASSES)
    blocks = raw.reshape(4, CLASSES, COUNT).logsumexp(2) - raw.logsumexp(1, keepdim=True)
    torch.testing.assert_close(folded.log_softmax(1), blocks)
    torch.testing.assert_close(folded.softmax(1), raw.softmax(1).reshape(4, CLASSES, COUNT).sum(2))
    (grad,) = torch.autograd.grad(folded[:, 1].sum(), raw)
    assert (grad.reshape(4, CLASSES, COUNT)[:, 1] > 0).all()
    assert grad.reshape(4, CLASSES, COUNT)[:, [0, 2, 3, 4, 5]].abs().max() == 0


@pytest.mark.parametrize("rotation", [True, False])
def test_positions_of_a_class_are_centred(rotation: bool) -> None:
    net, seen = taught(rotation=rotation)
    feature = net.inner.network.hidden(net.inner.network.flatten(seen.inputs))
    for k in range(CLASSES):
        total = net._positions(feature[seen.labels == k], seen.index)[:, k].sum(0)
        torch.testing.assert_close(total, torch.zeros(COUNT), atol=1e-4, rtol=0)


def test_turning_the_embedding_space_turns_nothing_but_signs() -> None:
    h, weight, labels = draw(0, 40, 9), draw(1, 3, 9), torch.arange(40) % 3
    turn = torch.linalg.qr(draw(2, 9, 9)).Q
    found = []
    for features, head in ((h, weight), (h @ turn.mT, weight @ turn.mT)):
        projector = losses.null_projector(head)
        mean, rows = losses.class_directions(features @ projector.mT, labels, 3, 4)
        found.append(losses.positions(features, projector, mean, rows))
    torch.testing.assert_close(found[0].abs(), found[1].abs())


def test_too_few_samples_or_directions_are_refused() -> None:
    with pytest.raises(DataError, match="class 1 has 3 samples but 3 subclasses need at least 4"):
        losses.class_directions(draw(0, 9, 6), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2]), 3, 3)
    with pytest.raises(ConfigError, match="subclasses is 15 but the embedding has only 14 directions of 20"):
        built(subclasses=15)
    assert built(subclasses=15, null_space=False)


def test_constant_embeddings_give_equal_subclasses() -> None:
    net, seen = built(), samples()
    still = replace(seen, inputs=seen.inputs[:1].expand_as(seen.inputs))
    with torch.no_grad():
        net.observe([still])
    p, q = subclasses(net, still)
    torch.testing.assert_close(q, (p / COUNT).unsqueeze(2).expand_as(q), rtol=1e-2, atol=1e-4)


def test_hidden_labels_are_not_read() -> None:
    seen = samples()
    known = torch.arange(60) % 10 > 0
    found = []
    for labels in (seen.labels, torch.where(known, seen.labels, 5 - seen.labels)):
        net = built()
        with torch.no_grad():
            net.observe([replace(seen, labels=labels, labelled=known)])
        found.append(net.rows)
    assert torch.equal(*found)


def test_prediction_is_of_classes_not_of_subclasses() -> None:
    student = LELPStudent(network=MLPStudent(hidden=(8,), images=IMAGES), subclasses=2).build(SPEC, seeded())
    raw = torch.full((1, 12), -9.0)
    raw[0, [0, 2, 3]] = torch.tensor([1.0, 0.8, 0.8])
    out = Outputs(losses.fold(raw, 6), raw)
    assert student.predict(out).argmax() == 1


def test_labels_reach_every_part_of_the_class() -> None:
    student = LELPStudent(network=MLPStudent(hidden=(8,), images=IMAGES), subclasses=2).build(SPEC, seeded())
    out = student(batch())
    (grad,) = torch.autograd.grad(Labels().terms(out, out, batch(), Progress())["labels"], out.soft_logits)  # type: ignore[arg-type]
    assert (grad.abs() > 0).all()


def test_windows_cut_whole_classes() -> None:
    raw = draw(0, 4, 12)
    cut = Outputs(losses.fold(raw, 6), raw).columns(2, 4)
    assert cut.soft_logits is not None
    assert torch.equal(cut.soft_logits, raw[:, 4:8])


def test_other_numbers_of_subclasses_are_refused() -> None:
    with pytest.raises(ShapeError, match="the student tells 12 subclasses apart and the teacher 18"):
        LELP().build(Outputs(draw(0, 4, 6), draw(1, 4, 12)), Outputs(draw(0, 4, 6), draw(1, 4, 18)))


def test_a_stream_is_refused() -> None:
    teacher = "teacher={name: lelp, teacher: {name: prompted_vit}}"
    asked = config.load("cdl-kd", (teacher,))
    with pytest.raises(ConfigError, match="looks at all data before it teaches"):
        asked.scenario.check(asked)


def test_killed_and_resumed_with_the_same_subclasses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    few = (
        "scenario.epochs=3", "scenario.teacher_epochs=1", "engine.threads=1", "engine.checkpoint_seconds=0",
        "engine.reuse_teachers=false", "scenario.optim.lr=0.01",
    )  # fmt: skip
    asked = config.load("lelp", few)
    whole = api.run(asked, out=tmp_path / "whole", quiet=True)

    class Killed(BaseException):
        pass

    steps, diagnoses = 0, Run.diagnoses

    def deadly(self: Run, at: Progress) -> bool:
        nonlocal steps
        steps += 1
        if steps == 27 + 4:
            raise Killed
        return diagnoses(self, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "diagnoses", deadly)
        api.run(asked, out=tmp_path / "cut", quiet=True)
    again = api.resume(tmp_path / "cut", quiet=True)
    weights = [(result.folder / "student" / "model.safetensors").read_bytes() for result in (whole, again)]
    assert weights[0] == weights[1]
    student = api.load_student(again.folder)
    assert student.predict(student(batch())).shape == (5, 2)
