"""What must be true of KD-AIF."""

from __future__ import annotations

import dataclasses
import math
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
from limbeck.contracts import Batch, Facts, Outputs, Progress, Selection
from limbeck.engine import curvature
from limbeck.engine.curvature import Params
from limbeck.engine.run import Run
from limbeck.errors import ConfigError
from limbeck.metrics import cost
from limbeck.objectives.talking import Talking
from limbeck.selectors.all import All
from limbeck.selectors.influence import Influence, Weighted, influence_of, influence_to_weight, last_layer

AT, DAMPING = Progress(step=0, steps=8), 0.1
MAPS: tuple[Any, ...] = ("exp", "sigmoid")
influences = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30)


def at_work(course: Small, **fields: Any) -> Weighted:
    found = Influence(**fields).prepare(course)
    assert isinstance(found, Weighted)
    return found


def linear(params: Params, batch: Batch) -> Tensor:
    return losses.cross_entropy(batch.inputs @ params["w"], batch.labels, reduction="none")


def batch(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Batch(inputs=inputs, labels=labels, index=torch.arange(count), view=torch.zeros(count).long())


# Influences


def minimum(training: Batch, weight: Tensor) -> Tensor:
    """Where the weighted cross entropy with an L2 penalty of DAMPING / 2 is least, by Newton's method."""
    w = torch.zeros(WIDTH * CLASSES, dtype=torch.float64)

    def total(vector: Tensor) -> Tensor:
        items = linear({"w": vector.view(WIDTH, CLASSES)}, training)
        return (weight * items).mean() + DAMPING / 2 * vector.square().sum()

    for _ in range(20):
        leaf = w.clone().requires_grad_()
        (grad,) = torch.autograd.grad(total(leaf), leaf)
        w = w - torch.linalg.solve(torch.autograd.functional.hessian(total, w), grad)
    return w.view(WIDTH, CLASSES)


def test_influences_are_those_of_retraining() -> None:
    """On a convex model, where the penalty's Hessian is the damping."""
    training, held_out, ones = batch(9, 0), batch(6, 1), torch.ones(9, dtype=torch.float64)
    params = {"w": minimum(training, ones).requires_grad_()}
    found, left = influence_of(linear, params, [training], [held_out], damping=DAMPING)
    step = 1e-4
    for sample in range(9):
        change = step * torch.eye(9, dtype=torch.float64)[sample]
        up, down = (minimum(training, ones + sign * change) for sign in (1, -1))
        risen = (linear({"w": up}, held_out) - linear({"w": down}, held_out)).mean() / (2 * step)
        assert found[sample].item() == pytest.approx(risen.item(), rel=1e-5, abs=1e-9)
    assert left < 1e-10


def test_solvers_give_the_same_influences() -> None:
    training, held_out = [batch(9, 0), batch(9, 2)], [batch(6, 1)]
    params = {"w": torch.zeros(WIDTH, CLASSES, dtype=torch.float64, requires_grad=True)}
    exact, _ = influence_of(linear, params, training, held_out, solver="exact", damping=DAMPING)
    cg, left = influence_of(linear, params, training, held_out, solver="cg", damping=DAMPING)
    torch.testing.assert_close(cg, exact, rtol=1e-4, atol=1e-8)
    assert left < 1e-5
    whole = [Batch(*(torch.cat(pair) for pair in zip(*(vars_of(b) for b in training), strict=True)))]
    lissa, _ = influence_of(
        linear, params, whole, held_out, solver="lissa", damping=DAMPING, scale=2.0, steps=2000
    )
    torch.testing.assert_close(lissa, exact, rtol=1e-4, atol=1e-8)
    turns, left = influence_of(
        linear, params, training, held_out, solver="lissa", damping=DAMPING, scale=20.0, steps=2000
    )
    assert left < 0.1  # with one batch a step it wanders about the solution
    assert torch.corrcoef(torch.stack([turns, exact]))[0, 1] > 0.98


def vars_of(given: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return given.inputs, given.labels, given.index, given.view


def test_twins_have_one_influence_and_no_gradient_none() -> None:
    training = batch(6, 0)
    training.inputs[3], training.labels[3] = training.inputs[1], training.labels[1]
    training.inputs[4] = 0
    params = {"w": torch.randn(WIDTH, CLASSES, dtype=torch.float64, requires_grad=True)}
    found, _ = influence_of(linear, params, [training], [batch(5, 1)])
    assert found[3].item() == pytest.approx(found[1].item(), rel=1e-12)
    assert found[4] == 0


def test_a_scaled_held_out_loss_scales_influences_and_leaves_the_weights() -> None:
    params = {"w": torch.randn(WIDTH, CLASSES, dtype=torch.float64, requires_grad=True)}
    training, held_out = [batch(9, 0)], [batch(6, 1)]
    matrix = curvature.hessian(linear, params, training)
    target = curvature.gradient(linear, params, held_out)
    one, three = (
        -curvature.slopes(linear, params, training, curvature.solve(matrix, scale * target, DAMPING)) / 9
        for scale in (1, 3)
    )
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(influence_to_weight(three), influence_to_weight(one))


# From influences to weights


@given(influences, st.sampled_from(MAPS), st.sampled_from([0.0, 0.01, 0.2]))
def test_helpful_samples_never_count_less_than_harmful_ones(
    values: list[float], map: Any, clip: float
) -> None:
    influence = torch.tensor(values, dtype=torch.float64)
    weights = influence_to_weight(influence, map, clip=clip)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights[influence.argsort()].diff() <= 1e-12).all()
    released = influence_to_weight(influence, map, sign="released", clip=clip)
    assert (released[influence.argsort()].diff() >= -1e-12).all()


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("value", [0.0, -0.3])
def test_equal_influences_give_weights_of_one(map: Any, value: float) -> None:
    assert torch.equal(influence_to_weight(torch.full((4,), value), map), torch.ones(4))


def test_the_ranges_of_the_maps() -> None:
    influence = torch.tensor([-2.0, 0.0, 1.0, 2.0])
    exp, sigmoid = (influence_to_weight(influence, map, clip=0) for map in MAPS)
    torch.testing.assert_close(exp[[0, 3]], torch.tensor([math.e, 1 / math.e]))
    assert exp[1] == sigmoid[1] == 1
    assert ((sigmoid > 0) & (sigmoid < 2)).all()


def test_one_outlier_does_not_set_the_scale_where_influences_are_cut_off() -> None:
    influence = torch.cat([torch.linspace(-1, 1, 199), torch.tensor([1e6])])
    kept, cut = (influence_to_weight(influence, clip=clip)[:199] for clip in (0.0, 0.01))
    assert kept.max() / kept.min() < 1.001
    assert cut.max() / cut.min() > 5


@given(influences)
def test_scaled_weights_have_the_mean_one(values: list[float]) -> None:
    influence = torch.tensor([*values, math.nan], dtype=torch.float64)
    weights = influence_to_weight(influence, mean_one=True)
    assert weights[-1] == 0
    assert weights[:-1].mean().item() == pytest.approx(1)


# At work


def test_weights_of_one_are_the_plain_loss() -> None:
    course = Small()
    selection = at_work(course)
    selection.weight.fill_(1)
    given = course.batch(course.index)
    weighted = course.step(selection)(given, AT)
    plain = course.step(Selection(All()))(given, AT)
    for name in ("labels", "kd"):
        torch.testing.assert_close(weighted[name], plain[name])


def test_every_sample_to_learn_from_has_a_weight_without_a_graph() -> None:
    course = Small()
    selection = at_work(course)
    given, none = course.batch(torch.tensor([5, 0, 11])), Outputs(torch.zeros(3, CLASSES))
    weights = selection.weights(given, none, none, AT)
    assert not weights.requires_grad
    assert torch.equal(weights, selection.weight[[5, 0, 11]])
    assert (selection.weight[course.index] > 0).all()
    assert (selection.weight[course.held_out] == 0).all()
    wanted, _ = influence_of(
        lambda p, b: losses.cross_entropy(
            curvature.call(course.student, p, b).logits, b.labels, reduction="none"
        ),
        curvature.parameters_of(course.student), [course.batch(course.index)],
        [course.batch(course.held_out)],
    )  # fmt: skip
    torch.testing.assert_close(selection.influence.double(), wanted, rtol=1e-5, atol=1e-8)
    assert selection.facts()["parameters"] == (WIDTH + 1) * CLASSES


def test_a_gradient_that_is_not_finite_costs_that_sample_its_weight_alone() -> None:
    course, rest = Small(), Small()
    course.inputs[7, 2] = math.inf
    rest.index = rest.index[rest.index != 7]
    spoilt, sound = at_work(course), at_work(rest)
    assert spoilt.weight[7] == 0
    torch.testing.assert_close(spoilt.weight[rest.index], sound.weight[rest.index])
    assert course.warned == ["influence: 1 samples, first 7, have no finite gradient: weight 0"]


def test_a_solver_that_falls_short_is_told() -> None:
    course = Small()
    at_work(course, solver="lissa", steps=1)
    (text,) = course.warned
    assert "of the gradient: raise selector.steps or damping" in text


def uneasy() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, CLASSES)
    )


@pytest.mark.parametrize(("layer", "count"), [("all", 25 + 10 + 18), ("auto", 25 + 10 + 18), ("last", 18)])
def test_the_probe_is_looked_at_at_rest_and_left_as_it_was(layer: Any, count: int) -> None:
    course = Small(uneasy())
    before = {name: value.clone() for name, value in course.student.state_dict().items()}
    first, again = (at_work(course, layer=layer) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in course.student.state_dict().items())
    assert all(p.grad is None for p in course.student.parameters())
    assert torch.equal(first.weight, again.weight)
    assert first.facts()["parameters"] == count


def test_a_large_network_is_looked_at_in_its_last_layer() -> None:
    course = Small(nn.Sequential(nn.Linear(WIDTH, 400), nn.ReLU(), nn.Linear(400, CLASSES, bias=False)))
    assert at_work(course).facts()["parameters"] == 400 * CLASSES
    assert last_layer(course.student, course.batch(course.index)) == ["network.2.weight"]


def test_hidden_labels_are_never_read() -> None:
    found = []
    for shift in (0, 1):
        course = Small()
        course.labelled = torch.arange(18) % 2 == 0
        course.labels = torch.where(course.labelled, course.labels, (course.labels + shift) % CLASSES)
        found.append(at_work(course).weight)
    assert torch.equal(*found)
    alone = Small(teacher=False)
    alone.labelled = torch.arange(18) % 2 == 0
    with pytest.raises(ConfigError, match=r"takes the teacher's class where data\.labelled hides"):
        at_work(alone)


def test_held_out_samples_without_labels_are_refused() -> None:
    course = Small()
    course.labelled = torch.arange(18) < 12
    with pytest.raises(ConfigError, match="no label of these 6 may be read: hold out more, or show more"):
        at_work(course)


def test_facts_tell_wrong_labels_apart_where_they_are_known() -> None:
    course = Small()
    assert "groups" not in at_work(course).facts()
    course.noisy = torch.arange(18) % 4 == 0
    selection = at_work(course)
    facts = selection.facts()
    own = selection.weight[course.index]
    assert facts["groups"]["wrong_label"]["samples"] == 3
    assert facts["groups"]["wrong_label"]["weight"] == pytest.approx(own[course.noisy[:12]].mean().item())
    assert 0 <= facts["detects_wrong_labels"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "cgs"}, "unknown solver 'cgs': did you mean 'cg'"),
        ({"sign": "right"}, "unknown sign 'right'"),
        ({"damping": 0.0}, "damping is 0.0: allowed are finite values above 0"),
        ({"steps": 0}, "steps is 0: allowed are values of at least 1"),
        ({"clip": 0.5}, "clip is 0.5: allowed are shares from 0 to below 0.5"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        Influence(**fields)


def test_held_out_samples_are_asked_for() -> None:
    course = Small()
    course.held_out = torch.arange(0)
    with pytest.raises(ConfigError, match=r"asks held-out samples but scenario\.validation is 0"):
        at_work(course)


# Whole runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def test_killed_before_and_after_the_weights_and_resumed(tmp_path: Path, quick: None) -> None:
    class Killed(BaseException):
        pass

    few = ("scenario.epochs=2", "scenario.teacher_epochs=1", "scenario.batch_size=256", "student.hidden=[2]")
    asked = config.load(
        "kd-aif",
        (*few, "selector.probe_epochs=2", "engine.threads=1", "engine.reuse_teachers=false",
         "engine.checkpoint_seconds=0"),
    )  # fmt: skip
    api.run(asked, out=tmp_path / "whole", quiet=True)
    diagnoses = Run.diagnoses
    for stage in ("probe-influence", "train"):
        steps = 0

        def deadly(self: Run, at: Progress, stage: str = stage) -> bool:
            nonlocal steps
            steps += self.stage == stage
            if steps == 4:
                raise Killed
            return diagnoses(self, at)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "diagnoses", deadly)
            api.run(asked, out=tmp_path / stage, quiet=True)
        api.resume(tmp_path / stage, quiet=True)
        small.assert_same(tmp_path / stage, tmp_path / "whole")


def test_influence_ranks_wrong_labels_above_right_ones(tmp_path: Path, quick: None) -> None:
    asked = config.load("kd-aif-labels", ("scenario.epochs=20", "engine.threads=1", "seed=100"))
    found = api.run(asked, out=tmp_path / "run", quiet=True).data["selection"]
    assert found["detects_wrong_labels"] > 0.9
    assert found["groups"]["wrong_label"]["weight"] < found["groups"]["right_label"]["weight"]


FEW = (
    "scenario.epochs=1", "scenario.teacher_epochs=1", "scenario.batch_size=256", "selector.probe_epochs=1",
    "engine.threads=1",
)  # fmt: skip


def test_a_probe_is_taught_by_objectives_that_remember_samples(tmp_path: Path, quick: None) -> None:
    crd = "{name: crd, negatives: 8, student_tap: hidden.-1, teacher_tap: hidden.-1}"
    asked = config.load("kd-aif", (*FEW, f"objective=[kd, {crd}]"))
    assert "selection" in api.run(asked, out=tmp_path / "run", quiet=True).data


def test_a_probe_talks_for_itself(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build, nets = Talking.build, []

    def watched(self: Talking, student: Outputs, teacher: Outputs, facts: Facts) -> Any:
        nets.append(facts.student)
        return build(self, student, teacher, facts)

    monkeypatch.setattr(Talking, "build", watched)
    taps = "student_low: hidden.0, student_high: hidden.1, teacher_low: hidden.0, teacher_high: hidden.1"
    asked = config.load(
        "kd-aif",
        (*FEW, f"objective=[labels, {{name: talking, {taps}}}]", "student.hidden=[4, 4]",
         "teacher.network.hidden=[4, 4]"),
    )  # fmt: skip
    api.run(asked, out=tmp_path / "run", quiet=True)
    one, other = nets
    assert one is not other


def test_a_probe_cannot_ask_a_path_that_learns(tmp_path: Path, quick: None) -> None:
    teacher = "teacher={name: dfpt, stages: [hidden.0], after_last: true, teacher: {name: trained}}"
    asked = config.load(
        "kd-aif",
        (*FEW, teacher, "teacher.teacher.network={name: mlp, hidden: [8]}",
         "objective=[labels, {name: kd, path: prompt}]"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"'kd' listens to a path that learns .*: set selector.taught to"):
        api.run(asked, out=tmp_path / "taught", quiet=True)
    free = dataclasses.replace(asked, selector=dataclasses.replace(asked.selector, taught=False))
    assert "selection" in api.run(free, out=tmp_path / "free", quiet=True).data
